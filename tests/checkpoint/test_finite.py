"""A model with a value that is not finite is not saved."""

import copy
import math
from pathlib import Path

import pytest
import torch
from torch import nn

from isoprune_hf.checkpoint.finite import require_finite
from isoprune_hf.checkpoint.folder import save_model_folder
from isoprune_hf.errors import CheckpointError


class Net(nn.Module):
    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(2, 3, dtype=dtype))
        self.tied = self.weight
        self.register_buffer("mask", torch.zeros(4, dtype=dtype))
        self.register_buffer("count", torch.zeros((), dtype=torch.long))
        self.register_buffer("unsaved", torch.full((2,), math.nan), persistent=False)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", ["weight", "mask"])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, torch.finfo(torch.float16).max])
def test_one_value_decides(value: float, name: str, dtype: torch.dtype) -> None:
    net = Net(dtype)
    require_finite(net)
    with torch.no_grad():
        getattr(net, name).view(-1)[1] = value
    if math.isfinite(value) or (name == "mask" and value == -math.inf):
        require_finite(net)
    else:
        with pytest.raises(CheckpointError, match=f"1 of . values of '{name}' "):
            require_finite(net)


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
def test_limits_may_be_infinite(value: float) -> None:
    net = Net(torch.float32)
    net.register_buffer("limit", torch.tensor(value))
    if math.isinf(value):
        require_finite(net)
    else:
        with pytest.raises(CheckpointError, match="1 of 1 values of 'limit' "):
            require_finite(net)


def test_models_without_values_pass() -> None:
    require_finite(Net(torch.float32).to("meta"))


def test_folder_of_the_model_before_stays(pruned, tmp_path: Path) -> None:
    sample = pruned("vit")
    broken = copy.deepcopy(sample.model)
    with torch.no_grad():
        next(broken.parameters()).view(-1)[0] = math.nan
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "config.json").write_text("old")
    with pytest.raises(CheckpointError, match=r"'model\.\S+'"):
        save_model_folder(tmp_path / "out", broken, sample.processor)
    assert [path.name for path in tmp_path.rglob("*")] == ["out", "config.json"]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_sum_that_overflows_is_no_fault(dtype: torch.dtype) -> None:
    net = Net(dtype)
    net.weight.data.fill_(torch.finfo(dtype).max)
    assert net.weight.sum().isinf()
    require_finite(net)
    net.weight.data[0, 0], net.weight.data[1, 2] = math.inf, -math.inf  # whose sum is nan
    with pytest.raises(CheckpointError, match="2 of 6 values"):
        require_finite(net)
