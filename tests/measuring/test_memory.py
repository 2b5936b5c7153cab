"""Memory of a forward pass, compared with counts by hand."""

from pathlib import Path

import psutil
import pytest
import torch
from torch import nn

from isoprune_hf.measuring import memory
from isoprune_hf.measuring.memory import peak_memory


class Steps(nn.Module):
    """Allocates two tensors of 1 MB, frees one, allocates a third."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1000))

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        first = torch.zeros(250_000) + 0
        second = first + 1
        del first
        return second.view(-1) * 2


class InPlace(nn.Module):
    """Allocates one tensor of 1 MB, then writes to it and returns a view."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1000))

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        return torch.zeros(250_000).add_(1).relu_().view(-1, 10)


def test_peak_counts_tensors_alive_at_once() -> None:
    # At most two tensors of 10^6 bytes at a time, plus 4000 bytes of weights and one image of 3 x 2 x 2 in fp32.
    assert peak_memory(Steps().eval(), (3, 2, 2)) == 2_000_000 + 4_000 + 48


def test_views_and_in_place_results_count_once() -> None:
    assert peak_memory(InPlace().eval(), (3, 2, 2)) == 1_000_000 + 4_000 + 48


def test_free_memory_ends_at_limit_of_container(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "_CGROUP", tmp_path)
    cpu = torch.device("cpu")
    whole = psutil.virtual_memory().total
    assert memory.free_memory(cpu)[1] == whole
    for limit, expected in (("max", whole), ("4096", 4096), (str(2 * whole), whole)):
        (tmp_path / "memory.max").write_text(f"{limit}\n")
        (tmp_path / "memory.current").write_text("1024\n")
        free, total = memory.free_memory(cpu)
        assert total == expected
        assert 0 < free <= total
    (tmp_path / "memory.max").write_text("4096\n")
    assert memory.free_memory(cpu)[0] == 3072
