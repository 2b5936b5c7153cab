"""Damaged and hostile folders: each raises an IsoPruneError or opens as a correct model.

`make fuzz` tries thousands of each kind; the suite a few. `ISOPRUNE_FUZZ` sets how many.
"""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.fuzzing import FEW, INPUTS, LIMITS, counts, damage, guarded, watched
from helpers.pruned_models import Pruned
from hypothesis import given, seed, settings
from hypothesis import strategies as st
from safetensors.torch import load

from isoprune_hf.errors import IsoPruneError
from isoprune_hf.limits import MAX_PROCESSED_SIDE
from isoprune_hf.models import load_base
from isoprune_hf.models.processors import processed_size
from isoprune_hf.models.saved_processor import saved_processor
from isoprune_hf.pruning.plan import PruningPlan
from isoprune_hf.reporting.plan_text import show_plan

__all__ = ["watched"]
PROCESSORS = [
    "ViTImageProcessor",
    "ViTImageProcessorFast",
    "CLIPImageProcessor",
    "ConvNextImageProcessor",
    "LevitImageProcessor",
    "SegformerImageProcessor",
    "PerceiverImageProcessor",
    "EfficientNetImageProcessor",
    "Siglip2ImageProcessor",
    "IdeficsImageProcessor",
    "MllamaImageProcessor",
    "Pix2StructImageProcessor",
    "Qwen2VLImageProcessor",
    "DonutImageProcessor",
    "TimmWrapperImageProcessor",
]
SETTINGS = {
    "do_pad": True,
    "pad_size": {"height": 32, "width": 32},
    "size": {"height": 16, "width": 16},
    "do_center_crop": True,
    "crop_size": {"height": 16, "width": 16},
    "patch_size": 4,
    "max_patches": 16,
    "max_num_patches": 16,
    "max_pixels": 1024,
    "min_pixels": 256,
    "size_divisor": 8,
    "max_image_tiles": 4,
    "crop_pct": 0.9,
}


def open_folder(folder: Path, kind: str) -> Any:
    """Open a folder; None if it raises an IsoPruneError."""
    with guarded(kind, folder):
        try:
            opened = load_base(str(folder))
        except IsoPruneError as error:
            counts[f"{kind} refused"] += 1
            assert str(error).strip()
            return None
    counts[f"{kind} opened"] += 1
    return opened


@pytest.fixture(scope="module")
def honest(pruned: Callable[[str], Pruned], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Pruned]:
    sample = pruned("vit")
    return shutil.copytree(sample.folder, tmp_path_factory.mktemp("fuzz") / "vit"), sample


@pytest.mark.fuzz
@pytest.mark.usefixtures("watched")
def test_damaged_config_is_refused_or_opens_correctly(honest: tuple[Path, Pruned]) -> None:
    folder, sample = honest
    file = folder / "config.json"
    original = json.loads(file.read_text())

    @seed(1)
    @settings(LIMITS, max_examples=max(INPUTS // 2, 1))
    @given(st.data())
    def attempt(data: st.DataObject) -> None:
        values = damage(data.draw, original)
        file.write_text(json.dumps(values))
        opened = open_folder(folder, "config")
        if opened is None:
            return
        assert {k: t.shape for k, t in opened.model.state_dict().items()} == {
            k: t.shape for k, t in sample.model.state_dict().items()
        }
        with torch.no_grad():
            logits = opened.model(sample.images.to(opened.model.dtype)).logits
        assert logits.shape == sample.logits.shape
        parts = ("base", "structure", "dtype", "torch_dtype", "image_size")
        if all(values.get(part) == original.get(part) for part in parts):
            assert torch.equal(logits, sample.logits)

    try:
        attempt()
    finally:
        file.write_text(json.dumps(original))


@pytest.mark.fuzz
@pytest.mark.usefixtures("watched")
def test_damaged_weights_are_refused_or_read_exactly(honest: tuple[Path, Pruned]) -> None:
    folder, _ = honest
    file = folder / "model.safetensors"
    original = file.read_bytes()
    header = 8 + int.from_bytes(original[:8], "little")
    spots = st.integers(0, 15) | st.integers(0, header - 1) | st.integers(0, len(original) - 1)

    @seed(2)
    @settings(LIMITS, max_examples=max(INPUTS // 4, 1))
    @given(
        st.lists(st.tuples(spots, st.integers(1, 255)), min_size=1, max_size=4),
        st.none() | st.integers(0, len(original)),
    )
    def attempt(flips: list[tuple[int, int]], length: int | None) -> None:
        content = bytearray(original)
        for spot, change in flips:
            content[spot] ^= change
        content = bytes(content[:length])
        file.write_bytes(content)
        opened = open_folder(folder, "weights")
        if opened is None:
            return
        # By an independent reader: every tensor is bit for bit what the file holds.
        found, held = opened.model.state_dict(), load(content)
        assert found.keys() == held.keys()
        assert all(found[name].numpy().tobytes() == held[name].numpy().tobytes() for name in held)

    try:
        attempt()
    finally:
        file.write_bytes(original)


@pytest.mark.fuzz
@pytest.mark.usefixtures("watched")
def test_damaged_plan_is_refused_or_read(honest: tuple[Path, Pruned]) -> None:
    folder, _ = honest
    file = folder / "pruning_plan.json"
    original = json.loads(file.read_text())

    @seed(3)
    @settings(LIMITS, max_examples=INPUTS - INPUTS // 2 - INPUTS // 4)
    @given(st.data())
    def attempt(data: st.DataObject) -> None:
        values = damage(data.draw, original)
        file.write_text(json.dumps(values))
        with guarded("plan", folder):
            try:
                plan = PruningPlan.load(folder)
                show_plan(plan, title="fuzz")
            except IsoPruneError:
                counts["plan refused"] += 1
                return
        counts["plan read"] += 1
        assert {name: list(indices) for name, indices in plan.kept.items()} == values["kept"]

    try:
        attempt()
    finally:
        file.write_text(json.dumps(original))


def try_processors(folder: Path, inputs: int) -> None:
    """Open damaged processors of many kinds, and process an image with each that opens."""
    file = folder / "preprocessor_config.json"
    original = json.loads(file.read_text())

    @seed(4)
    @settings(LIMITS, max_examples=inputs)
    @given(st.data())
    def attempt(data: st.DataObject) -> None:
        kind = data.draw(st.none() | st.sampled_from(PROCESSORS))
        added = data.draw(st.lists(st.sampled_from(sorted(SETTINGS)), max_size=3))
        values = {**original, **({} if kind is None else {"image_processor_type": kind})}
        values = damage(data.draw, {**values, **{name: SETTINGS[name] for name in added}})
        file.write_text(json.dumps(values))
        with guarded("processor", folder):
            try:
                size = processed_size("fuzz", saved_processor(str(folder)))
            except IsoPruneError as error:
                counts["processor refused"] += 1
                assert "preprocessor_config.json" in str(error) and "\n" not in str(error)
                return
        counts["processor opened"] += 1
        assert len(size) == 3 and max(size[1:]) <= 2 * MAX_PROCESSED_SIDE

    try:
        attempt()
    finally:
        file.write_text(json.dumps(original))


def test_few_damaged_processors_are_refused_or_run(honest: tuple[Path, Pruned]) -> None:
    try_processors(honest[0], FEW)


@pytest.mark.fuzz
@pytest.mark.usefixtures("watched")
def test_damaged_processor_is_refused_or_runs(honest: tuple[Path, Pruned]) -> None:
    try_processors(honest[0], INPUTS // 2)
