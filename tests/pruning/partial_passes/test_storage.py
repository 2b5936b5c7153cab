"""Tensors are stored in memory or in files, with the same bits, and the files leave nothing behind."""

import copy
import gc
import tempfile
from functools import partial
from pathlib import Path

import pytest
import torch
from helpers.tiny_models import make_base
from torch import nn

from isoprune_hf.checkpoint.modeling_isoprune import IsoPruneForImageClassification
from isoprune_hf.pruning.calibration.calibration import Calibration
from isoprune_hf.pruning.partial_passes import storage
from isoprune_hf.pruning.partial_passes.passes import Images, Passes
from isoprune_hf.pruning.partial_passes.storage import Storage
from isoprune_hf.pruning.partial_passes.waypoints import find_waypoints
from isoprune_hf.pruning.repairing import fit_layers
from isoprune_hf.pruning.repairing.dense_outputs import DenseOutputs
from isoprune_hf.pruning.repairing.layer_calls import find_layers

Model = IsoPruneForImageClassification
CPU = torch.device("cpu")
PLENTY, NONE = (2**40, 2**41), (0, 2**41)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Let temporary files be written to a folder of the test."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


def limit(monkeypatch: pytest.MonkeyPatch, memory: tuple[int, int], disk: tuple[int, int]) -> None:
    monkeypatch.setattr(storage, "free_memory", lambda device: memory)
    monkeypatch.setattr(storage, "_free_disk", lambda: disk)


def files_of(tensor: torch.Tensor) -> list[str]:
    """Return the lines of the memory map that contain the address of a tensor and a file."""
    found = []
    for line in Path("/proc/self/maps").read_text(encoding="utf-8").splitlines():
        begin, end = (int(part, 16) for part in line.split()[0].split("-"))
        if begin <= tensor.data_ptr() < end and "isoprune-" in line:
            found.append(line)
    return found


@pytest.mark.parametrize("values", [torch.arange(24.0).view(2, 3, 4), torch.randn(3, 5).T, torch.zeros(0, 3)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64])
def test_file_has_the_same_values(
    values: torch.Tensor, dtype: torch.dtype, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    limit(monkeypatch, NONE, PLENTY)
    keep = Storage(CPU).place(values.nbytes)
    kept = keep(values.to(dtype))
    assert kept.dtype == dtype
    assert torch.equal(kept, values.to(dtype))
    assert bool(files_of(kept)) == bool(values.numel())
    assert [*folder.iterdir()] == []


def test_place_is_the_first_with_room(monkeypatch: pytest.MonkeyPatch) -> None:
    values = torch.randn(8)
    limit(monkeypatch, (100, 200), (1000, 2000))  # a quarter of all stays free: 50 of 100, 500 of 1,000
    store = Storage(CPU)
    assert store.place(50)(values, is_copied=False) is values
    assert files_of(store.place(51)(values))
    assert files_of(store.place(500)(values))
    assert store.place(501) is None
    assert store.hold(values) is values  # 32 bytes
    half = Storage(CPU, ranks=2)
    assert files_of(half.hold(values))
    assert half.place(26)(values, is_copied=False) is not values
    assert half.place(251) is None


def test_small_tensors_are_stored_on_full_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    values = torch.randn(2)
    limit(monkeypatch, (80, 1000), (800, 10_000))  # less than a quarter is free: an eighth of it may be used
    assert Storage(CPU).place(10)(values, is_copied=False) is values
    assert files_of(Storage(CPU).place(100)(values))
    assert Storage(CPU).place(101) is None


def test_tensor_is_kept_itself_only_if_allowed() -> None:
    values = torch.randn(4, 3)
    keep = Storage(CPU, always=1).place(1)
    assert keep(values, is_copied=False) is values
    for other, is_copied in ((values, True), (values[:2], False)):
        kept = keep(other, is_copied=is_copied)
        assert torch.equal(kept, other)
        assert kept.untyped_storage().nbytes() == other.nbytes
        assert kept.data_ptr() != other.data_ptr()


class Writer(nn.Module):
    """A network that writes into outputs of its modules after they have returned, and into views of them."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.same = nn.Conv2d(3, 4, 3), nn.Identity()
        self.first, self.second, self.third = (nn.Sequential(nn.Conv2d(4, 4, 1)) for _ in range(3))
        self.head = nn.Linear(4, 5)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        x = self.same(self.stem(images))
        y = self.first(x)
        x.relu_()  # the output of two modules
        z = self.second(y) + x
        y[:, :2].mul_(0.5)
        return self.head(self.third(z + y).mean((2, 3)))


@pytest.mark.parametrize(("memory", "disk"), [(PLENTY, NONE), (NONE, PLENTY)], ids=["memory", "files"])
def test_place_changes_no_bit_of_a_fit(
    memory: tuple[int, int], disk: tuple[int, int], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    dense = make_base("vit", folder)
    dense.model, dense.config.image_size = Writer().eval(), [3, 8, 8]
    cut = copy.deepcopy(dense)
    with torch.no_grad():
        for part in (cut.model.stem, cut.model.first[0], cut.model.third[0]):
            part.weight.mul_(0.7)
    before = {path.name for path in folder.iterdir()}
    batches = [(torch.randn(6, 3, 8, 8), torch.zeros(6)) for _ in range(2)]
    fitted = []
    for places in ((NONE, NONE), (memory, disk)):
        limit(monkeypatch, *places)
        network = copy.deepcopy(cut)
        fit_layers.fit_layers(dense, network, {}, Calibration(batches))
        fitted.append(network.state_dict())
    assert all(torch.equal(value, fitted[1][name]) for name, value in fitted[0].items())
    assert not torch.equal(fitted[0]["model.third.0.weight"], cut.state_dict()["model.third.0.weight"])
    gc.collect()
    assert {path.name for path in folder.iterdir()} == before


def test_large_dense_outputs_are_kept_in_files(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dense = make_base("vit", folder)
    dense.model, dense.config.image_size = Writer().eval(), [3, 8, 8]
    batches = [torch.randn(6, 3, 8, 8)] * 2
    stem = 12 * 4 * 6 * 6 * 4  # bytes of the outputs of the stem, and of `first`
    with torch.no_grad():
        layers, _ = find_layers(dense, dense, {}, {}, {})
        for room, in_files in ((2 * stem, []), (2 * stem - 1, ["stem", "first.0"])):
            limit(monkeypatch, (room, 0), PLENTY)
            find = partial(find_waypoints, dense, [layer.name for layer in layers])
            passes = Passes(dense, Images(batches), find, Storage(CPU))
            outputs = DenseOutputs(passes, layers, max_bytes=2 * stem)
            for layer in layers[:2]:
                calls = [call for calls in outputs.of_next() for call in calls]
                assert [bool(files_of(call.output)) for call in calls] == [layer.name in in_files] * 2


def test_file_is_gone_after_an_error(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    limit(monkeypatch, NONE, PLENTY)
    before = [*folder.iterdir()]

    def fail() -> None:
        Storage(CPU).place(4)(torch.zeros(1))
        raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert [*folder.iterdir()] == before
