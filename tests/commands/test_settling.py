"""A stage settles the section prune by the images and scores that it has."""

import logging
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from accelerate import PartialState
from helpers.stage_commands import write_four_classes

from isoprune_hf.commands.steps.settling import settle
from isoprune_hf.data.dataset import ImageData, load_data
from isoprune_hf.errors import DatasetError, RecipeError
from isoprune_hf.pruning.scoring.scores import ImportanceScores
from isoprune_hf.recipes import DataRecipe, PruneRecipe


@pytest.fixture(autouse=True)
def started() -> None:
    PartialState()  # for the loggers of accelerate


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> ImageData:
    return load_data(DataRecipe(dataset=str(write_four_classes(tmp_path_factory.mktemp("images")))))


def write_scores(folder: Path, criterion: str, *, rotated: bool) -> str:
    scores = ImportanceScores({"a": torch.arange(4.0)}, criterion, "print", {}, rotated=rotated)
    scores.save(folder / "scores.safetensors")
    return str(folder / "scores.safetensors")


def test_images_keep_rotation_and_repair(images: ImageData, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    prune, scores, reader = settle(PruneRecipe(model="m", criterion="l1"), images)
    assert (prune.rotate, prune.reconstruct, scores, reader) == (True, "least_squares", None, "rotate")
    assert caplog.text == ""


@pytest.mark.parametrize("split", [None, "evaluation"])
def test_weights_without_images_say_one_line(
    split: str | None, images: ImageData, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    found = None if split is None else replace(images, train=None)
    prune, _, reader = settle(PruneRecipe(model="m", criterion="l1"), found)
    assert (prune.rotate, prune.reconstruct, reader) == (False, "none", None)
    (line,) = caplog.messages
    assert "accuracy" in line and "--data DIR" in line


def test_setting_that_needs_images_is_refused(images: ImageData) -> None:
    for given in ({}, {"criterion": "taylor"}, {"criterion": "l1", "reconstruct": "bn"}):
        with pytest.raises(RecipeError, match="needs data"):
            settle(PruneRecipe(model="m", **given), None)
        with pytest.raises(DatasetError, match="training split"):
            settle(PruneRecipe(model="m", **given), replace(images, train=None))


@pytest.mark.parametrize("rotated", [True, False])
def test_scores_bring_criterion_and_rotation(tmp_path: Path, images: ImageData, *, rotated: bool) -> None:
    file = write_scores(tmp_path, "l1", rotated=rotated)
    prune, scores, reader = settle(PruneRecipe(model="m"), images, file)
    assert (prune.criterion, prune.rotate, prune.reconstruct) == ("l1", rotated, "least_squares")
    assert scores is not None and reader == ("rotate" if rotated else "reconstruct")


def test_known_scores_need_no_images(tmp_path: Path) -> None:
    file = write_scores(tmp_path, "gate_fisher_joint", rotated=False)
    prune, _, reader = settle(PruneRecipe(model="m"), None, file)
    assert (prune.allocation, prune.reconstruct, reader) == ("knapsack", "none", None)
    rotated = write_scores(tmp_path, "gate_fisher_joint", rotated=True)
    with pytest.raises(RecipeError, match=r"prune\.rotate"):
        settle(PruneRecipe(model="m"), None, rotated)
    assert settle(PruneRecipe(model="m"), None, rotated, only_decides=True).reader is None
