"""Figures of semantic segmentation: against masks and against the dense network, on any number of ranks."""

import functools
import io
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from datasets import Image
from helpers.evaluation import make_processor, make_split
from helpers.ranks import call_on_ranks
from PIL import Image as PILImage
from torch import nn

from isoprune_hf import IsoPruneConfig
from isoprune_hf.data.columns import MASK
from isoprune_hf.data.loading import LoaderOptions
from isoprune_hf.errors import DatasetError
from isoprune_hf.evaluation.segmentation import evaluate_pixels
from isoprune_hf.models.held import HeldModel
from isoprune_hf.models.pixel_loss import PIXEL_CLASSES

SIZE, CLASSES = [3, 4, 4], 3


def make_masks(images: int) -> list[np.ndarray]:
    random = np.random.default_rng(0)
    masks = [random.integers(CLASSES, size=(3 + place % 2, 5)).astype(np.uint8) for place in range(images)]
    for mask in masks:
        mask[0, 0] = 255  # is left out
    return masks


def encode(mask: np.ndarray) -> bytes:
    file = io.BytesIO()
    PILImage.fromarray(mask).save(file, "PNG")
    return file.getvalue()


def make_network(seed: int) -> HeldModel:
    """Return a network of logits of 3 classes at 3 x 3 pixels, with weights from a seed."""
    torch.manual_seed(seed)

    class Network(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, CLASSES, 2)

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return 5 * self.conv(images)

    names = {index: str(index) for index in range(CLASSES)}
    return HeldModel(IsoPruneConfig(image_size=SIZE, id2label=names), Network(), PIXEL_CLASSES)


def measure(images: int, batch_size: int, accelerator: Accelerator | None = None) -> dict[str, float | int]:
    masks = [{"bytes": encode(mask), "path": None} for mask in make_masks(13)]
    split = make_split(13).add_column(MASK, masks, feature=Image(decode=False))
    options = LoaderOptions(batch_size)
    networks = make_network(0), make_network(1)
    return evaluate_pixels(*networks, split.select(range(images)), make_processor(), options, accelerator=accelerator)


def test_figures_equal_those_of_single_pixels() -> None:
    first, second = make_network(0), make_network(1)
    same, inside, either = [], [0] * CLASSES, [0] * CLASSES
    right = total = 0
    for row, mask in zip(make_split(13), make_masks(13), strict=True):
        pixels = make_processor()(row["image"], return_tensors="pt")["pixel_values"]
        with torch.no_grad():
            found, wanted = first.model(pixels)[0], second.model(pixels)[0]
        same.append((found.argmax(0) == wanted.argmax(0)).double().mean())
        resized = nn.functional.interpolate(found[None], size=mask.shape, mode="bilinear")[0].argmax(0)
        for answer, truth in zip(resized.flatten().tolist(), mask.flatten().tolist(), strict=True):
            if truth == 255:
                continue
            right, total = right + (answer == truth), total + 1
            inside[truth] += answer == truth
            for index in {answer, truth}:
                either[index] += 1
    figures = measure(13, 4)
    assert figures["images"] == 13
    assert figures["same_class"] == pytest.approx(float(sum(same)) / 13)
    assert figures["miou"] == pytest.approx(sum(a / b for a, b in zip(inside, either, strict=True)) / CLASSES)
    assert figures["pixel_accuracy"] == pytest.approx(right / total)


def test_cropping_processor_is_refused_for_masks() -> None:
    split = make_split(2).add_column(MASK, [{"bytes": b"", "path": None}] * 2, feature=Image(decode=False))
    processor = make_processor()
    processor.do_center_crop = True
    with pytest.raises(DatasetError, match="do_center_crop"):
        evaluate_pixels(make_network(0), None, split, processor, LoaderOptions(2))


def save_measured(accelerator: Accelerator, folder: Path) -> None:
    found = {images: measure(images, 2, accelerator) for images in (1, 2, 13)}
    (folder / f"rank{accelerator.process_index}.json").write_text(json.dumps(found), encoding="utf-8")


@pytest.mark.launch
def test_two_ranks_measure_what_one_does(tmp_path: Path) -> None:
    call_on_ranks(functools.partial(save_measured, folder=tmp_path), tmp_path / "log")
    ranks = [json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in range(2)]
    assert ranks[0] == ranks[1]
    for images in (1, 2, 13):
        assert ranks[0][str(images)] == pytest.approx(measure(images, 2), rel=1e-6)
