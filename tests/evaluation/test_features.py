"""Figures of features: cosine similarity with the dense ones, and the class of the nearest other images."""

import functools
import json
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from helpers.evaluation import make_processor, make_split
from helpers.ranks import call_on_ranks
from torch import nn

from isoprune_hf import IsoPruneConfig
from isoprune_hf.data.loading import LoaderOptions
from isoprune_hf.evaluation.features import evaluate_features, find_by_neighbours, pooled_of
from isoprune_hf.models.feature_loss import FEATURES
from isoprune_hf.models.held import HeldModel

SIZE = [3, 4, 4]


def test_class_is_that_of_nearest_other_images() -> None:
    features = torch.tensor([[1.0, 0.0], [0.9, 0.1], [0.0, 1.0], [0.1, 0.9], [1.0, 0.05]])
    labels = torch.tensor([0, 0, 1, 1, 1])  # the last one lies among the images of class 0
    assert find_by_neighbours(features, labels).tolist() == [1, 1, 1, 1, 0]


def test_near_neighbours_outweigh_many_far_ones() -> None:
    far = torch.tensor([[0.0, 1.0]]).expand(15, 2)  # similarity 0 to the first two
    features = torch.cat([torch.tensor([[1.0, 0.0], [1.0, 0.0]]), far])
    labels = torch.tensor([7, 7, *[2] * 15])
    assert find_by_neighbours(features, labels)[:2].tolist() == [7, 7]  # exp(1 / 0.07) > 15


def test_pooled_features_are_the_last_single_ones() -> None:
    tokens, pooled = torch.arange(12.0).reshape(1, 4, 3), torch.ones(1, 1, 5)
    assert torch.equal(pooled_of([tokens, pooled]), torch.ones(1, 5))
    assert torch.equal(pooled_of([tokens]), torch.tensor([[4.5, 5.5, 6.5]]))


def make_features(seed: int) -> HeldModel:
    """Return a network of a map of 5 channels and its mean, with weights from a seed."""
    torch.manual_seed(seed)

    class Network(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 5, 2)

        def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            found = self.conv(images).tanh()
            return found, found.mean((2, 3))

    return HeldModel(IsoPruneConfig(image_size=SIZE), Network(), FEATURES)


def measure(images: int, batch_size: int, accelerator: Accelerator | None = None) -> dict[str, float | int]:
    split = make_split(13).select(range(images))
    options = LoaderOptions(batch_size)
    return evaluate_features(
        make_features(0), make_features(1), split, make_processor(), options, accelerator=accelerator
    )


def test_figures_equal_those_of_single_images() -> None:
    split, first, second = make_split(13), make_features(0), make_features(1)
    pooled, positions = [], []
    for row in split:
        pixels = make_processor()(row["image"], return_tensors="pt")["pixel_values"]
        with torch.no_grad():
            (a, mean_a), (b, mean_b) = first.model(pixels), second.model(pixels)
        pooled.append((mean_a * mean_b).sum() / (mean_a.norm() * mean_b.norm()))
        positions.append(((a * b).sum(1) / (a.norm(dim=1) * b.norm(dim=1))).mean())
    figures = measure(13, 4)
    assert figures["images"] == 13 and 0 <= figures["knn"] <= 1
    assert figures["cosine"] == pytest.approx(float(sum(pooled)) / 13, abs=1e-6)
    assert figures["position_cosine"] == pytest.approx(float(sum(positions)) / 13, abs=1e-6)


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
