"""The budget of constructors: tables of any size are refused before they are allocated."""

import copy
import itertools
import json
import resource
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.fresh_python import FreshPython
from safetensors.torch import save_file
from torch import nn

from isoprune_hf.checkpoint import building
from isoprune_hf.checkpoint.building import Building, check_tables
from isoprune_hf.checkpoint.dense import IsoPruneConfig, build_base
from isoprune_hf.checkpoint.meta import build_on_meta
from isoprune_hf.errors import CheckpointError, IsoPruneError
from isoprune_hf.models import load_base

SIDE = 2**17  # side x side numbers of 8 bytes are 128 GiB
WINDOW = {"img_size": 640, "window_size": 160, "embed_dim": 24, "depths": [1], "num_heads": [2]}
SWIN = {"image_size": 640, "window_size": 160, "embed_dim": 24, "depths": [1], "num_heads": [2]}
BASES: dict[str, dict[str, Any]] = {
    "timm": {"library": "timm", "architecture": "swin_tiny_patch4_window7_224", "args": WINDOW},
    "timm beit": {"library": "timm", "architecture": "beit_base_patch16_224", "args": {"img_size": 2560, "depth": 1}},
    "transformers": {"library": "transformers", "config": {"model_type": "swin", **SWIN}},
    "second version": {"library": "transformers", "config": {"model_type": "swinv2", **SWIN}},
}
TABLES: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "difference": lambda row: row[:, None] - row[None],
    "product": lambda row: torch.outer(row, row),
    "matrices": lambda row: row[:, None] @ row[None],
    "repeat": lambda row: row.repeat(SIDE),
    "tile": lambda row: torch.tile(row, (SIDE, 1)),
    "copy of a view": lambda row: row.expand(SIDE, SIDE).contiguous(),
    "zeros": lambda row: torch.zeros(SIDE, SIDE),
    "range": lambda row: torch.arange(SIDE**2),
    "identity": lambda row: torch.eye(SIDE),
    "diagonal": lambda row: torch.diag(row),
    "distances": lambda row: torch.cdist(row[None, :, None].float(), row[None, :, None].float()),
    "new": lambda row: row.new_ones(SIDE, SIDE),
    "one hot": lambda row: nn.functional.one_hot(row.long(), SIDE),
}


@pytest.mark.parametrize("name", BASES)
def test_base_with_huge_tables_is_refused_unbuilt(name: str) -> None:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with torch.device("meta"), pytest.raises(CheckpointError, match=r"buffers of 5,24[\d,]+ bytes"):
        build_base(IsoPruneConfig(base=BASES[name], num_labels=3))
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 2**18  # KiB


FOLDERS = {
    "timm": {
        "architecture": "swin_tiny_patch4_window7_224",
        "num_classes": 3,
        "model_args": WINDOW,
        "pretrained_cfg": {"input_size": [3, 640, 640], "num_classes": 3},
    },
    "transformers": {"model_type": "swin", **SWIN},
    "wrapped": {
        "model_type": "timm_wrapper",
        "architecture": "swin_tiny_patch4_window7_224",
        "model_args": WINDOW,
        "num_classes": 3,
        "label_names": ["a", "b", "c"],
    },
}


@pytest.mark.parametrize("pretrained", [False, True])
@pytest.mark.parametrize("library", FOLDERS)
def test_folder_of_a_library_has_the_same_budget(library: str, pretrained: bool, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(FOLDERS[library]))
    save_file({"a": torch.zeros(1)}, tmp_path / "model.safetensors")
    with pytest.raises(IsoPruneError, match=r"buffers of 5,24[\d,]+ bytes"):
        load_base(str(tmp_path), pretrained=pretrained)


@pytest.mark.parametrize("reads_values", [False, True])
@pytest.mark.parametrize("name", TABLES)
def test_table_is_refused_before_it_is_computed(name: str, reads_values: bool) -> None:
    """Also by a constructor that reads values, whose sizes are not known from the meta device."""

    def build() -> nn.Module:
        network = nn.Linear(3, 3)
        if reads_values:
            torch.linspace(0, 1, 3).tolist()
        network.register_buffer("table", TABLES[name](torch.arange(SIDE)), persistent=False)
        return network

    with torch.device("meta"), pytest.raises(ValueError, match=r"^buffers of [\d,]+ bytes"):
        build_on_meta(build)


def test_many_tables_are_refused_together(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(building, "MAX_UNSAVED_BYTES", 2**20)

    def build(count: int) -> nn.Module:
        network = nn.Linear(3, 3)
        torch.linspace(0, 1, 3).tolist()
        for number in range(count):
            network.register_buffer(f"table{number}", torch.zeros(2**15), persistent=number % 2 == 0)
        return network

    with torch.device("meta"):
        build_on_meta(lambda: build(8))
        with pytest.raises(ValueError, match=r"^buffers of 1,179,648 bytes"):
            build_on_meta(lambda: build(9))


def test_constructor_of_endless_operations_is_stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(building, "MAX_BUILD_CALLS", 100)
    table = torch.zeros(1)
    with Building(), pytest.raises(ValueError, match="more than 100 operations"):
        for _ in range(101):
            table[0] = 1


# Loops over lists, and tables of Python and numpy, of which torch knows nothing.


def relate_positions(side: int) -> list[int]:
    """Return the index of the offset of each pair of positions in a square, as LevIT and TinyViT do."""
    points = list(itertools.product(range(side), range(side)))
    offsets: dict[tuple[int, int], int] = {}
    return [offsets.setdefault((abs(a[0] - b[0]), abs(a[1] - b[1])), len(offsets)) for a in points for b in points]


PLAIN: dict[str, tuple[Callable[[], object], str]] = {
    "loop": (lambda: relate_positions(12), "calls and returns of functions"),
    "list": (lambda: [None] * 2**26, "bytes of memory"),  # at once: memory that is free already is not new
    "text": (lambda: "x" * 2**28, "bytes of memory"),
    "numpy": (lambda: np.zeros((2**15, 2**13)), "bytes of memory"),
}


@pytest.mark.parametrize("reads_values", [False, True])
@pytest.mark.parametrize("name", PLAIN)
def test_work_outside_of_torch_is_bounded(name: str, reads_values: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """A square of 12 x 12 has 20,736 pairs, with three calls each; the limits here are lower than in use."""
    monkeypatch.setattr(building, "MAX_BUILD_STEPS", 20_000)
    monkeypatch.setattr(building, "MAX_BUILD_BYTES", 2**26)
    monkeypatch.setattr(threading, "active_count", lambda: 1)  # earlier tests may have left some
    compute, words = PLAIN[name]

    def build() -> nn.Module:
        if reads_values:
            torch.linspace(0, 1, 3).tolist()
        compute()
        return nn.Linear(3, 3)

    limits = resource.getrlimit(resource.RLIMIT_DATA)
    with torch.device("meta"), pytest.raises(ValueError, match=rf"^more than [\d,]+ {words}$"):
        build_on_meta(build)
    assert sys.getprofile() is None and resource.getrlimit(resource.RLIMIT_DATA) == limits


def test_copies_of_modules_are_few_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(building, "MAX_BUILD_STEPS", 1_000_000)  # each copy was checked with all that were made before
    copied = build_on_meta(lambda: copy.deepcopy(nn.Sequential(*(nn.BatchNorm1d(9) for _ in range(100)))))
    assert copied[99].running_mean.shape == (9,)


@pytest.mark.parametrize("kind", [list, tuple])
def test_long_list_of_numbers_is_few_steps(kind: type, monkeypatch: pytest.MonkeyPatch) -> None:
    """The product of so many indices has ten million digits, and each index was three calls."""
    monkeypatch.setattr(building, "MAX_BUILD_STEPS", 10_000)
    indices = kind(range(1, 2**20 + 1))
    with Building():
        assert torch.tensor(indices).sum() == 2**19 * (2**20 + 1)
    with Building(), torch.device("meta"):
        assert torch.tensor([indices, indices]).shape == (2, 2**20)


def test_long_list_of_ones_is_a_table() -> None:
    ones = [1] * (2**24 + 1)
    with Building(has_weights=True), pytest.raises(ValueError, match=r"^buffers of 134,217,736 bytes"):
        torch.tensor(ones)


def test_empty_table_is_refused_before_its_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(building, "MAX_TABLE_BYTES", 1000)
    with Building():
        allowed, larger = torch.empty(250), torch.empty(251)
        assert copy.deepcopy(allowed).shape == (250,)
        with pytest.raises(ValueError, match=r"^buffers of 1,004 bytes"):
            copy.deepcopy(larger)


def test_ordinary_loops_and_lists_pass() -> None:
    with torch.device("meta"):
        assert build_on_meta(lambda: nn.Linear(len(set(relate_positions(7))), 3)).in_features == 7 * 7


def test_budget_leaves_a_profiler_alone() -> None:
    def listen(*_: object) -> None:
        pass

    sys.setprofile(listen)
    try:
        with Building():
            inside = sys.getprofile()
        after = sys.getprofile()
    finally:
        sys.setprofile(None)
    assert inside is after is listen


def test_memory_of_other_threads_is_not_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(building, "MAX_BUILD_BYTES", 2**20)
    waiting, done = threading.Event(), threading.Event()
    other = threading.Thread(target=lambda: (waiting.set(), done.wait()))
    other.start()
    waiting.wait()
    try:
        with Building():
            assert len(bytearray(2**26)) == 2**26
    finally:
        done.set()
        other.join()


LARGE_SIDES = {
    "levit": {"library": "transformers", "config": {"model_type": "levit", "image_size": 1024}},
    "efficientvit": {
        "library": "timm",
        "architecture": "efficientvit_m0",
        "args": {"img_size": 2**14, "window_size": [2**13] * 3},
    },
    "tiny_vit": {"library": "timm", "architecture": "tiny_vit_5m_224", "args": {"window_sizes": [2**20] * 4}},
}


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name == "tiny_vit" else pytest.mark.faults) for name in LARGE_SIDES]
)
def test_networks_with_large_sides_are_refused(name: str) -> None:
    with torch.device("meta"), pytest.raises(CheckpointError, match=r"more than|cannot be built"):
        build_base(IsoPruneConfig(base=LARGE_SIDES[name], num_labels=3))


LIST_OF_PIXELS = """
import torch
from isoprune_hf.checkpoint.dense import IsoPruneConfig, build_base

config = {"model_type": "levit", "image_size": 2**20, "patch_size": 1}
with torch.device("meta"):
    build_base(IsoPruneConfig(base={"library": "transformers", "config": config}, num_labels=3))
"""


@pytest.mark.faults
def test_list_of_all_pixels_is_refused(fresh_python: FreshPython) -> None:
    # In a process of its own: the memory of one with other threads is not bounded.
    done = fresh_python.run(LIST_OF_PIXELS)
    assert done.returncode == 1 and "bytes of memory" in done.stderr, done.stderr


def test_views_and_small_tables_pass() -> None:
    with Building():
        assert torch.zeros(1).expand(SIDE, SIDE).shape == (SIDE, SIDE)
        assert torch.empty(SIDE, SIDE, device="meta").is_meta
        assert torch.zeros(2**12, 2**12).sum() == 0
    check_tables([torch.empty(2**25, device="meta")])
    with pytest.raises(ValueError, match="the limit is 134,217,728"):
        check_tables([torch.empty(2**25 + 1, device="meta")])


def test_hook_ends_with_the_budget() -> None:
    with pytest.raises(KeyError), Building():
        raise KeyError
    nn.Linear(2, 2).register_buffer("table", torch.zeros(3))
    assert not torch.nn.modules.module._global_buffer_registration_hooks
