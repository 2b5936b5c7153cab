"""The estimate before a pruning."""

import logging
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from accelerate import Accelerator
from datasets import Dataset
from helpers.tiny_models import make_base

from isoprune_hf.commands.steps import estimating
from isoprune_hf.commands.steps.opening import Opened
from isoprune_hf.data.dataset import ImageData
from isoprune_hf.measuring.runtimes.engine import Runtime
from isoprune_hf.models import BaseModel
from isoprune_hf.pruning.cost.macs import count_cost
from isoprune_hf.pruning.forecast import time_pass
from isoprune_hf.recipes import DataRecipe, FinetuneRecipe, PruneRecipe


@pytest.fixture
def opened(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> Opened:
    caplog.set_level(logging.INFO, "isoprune_hf")
    base, images = BaseModel(make_base("vit", tmp_path), SimpleNamespace()), SimpleNamespace(evaluation=range(50))
    prune = PruneRecipe(target_macs="50%").settled(has_images=True)
    return Opened(prune, DataRecipe(), images, base, None, "criterion", Accelerator(cpu=True))


def line_of(caplog: pytest.LogCaptureFixture) -> str:
    (record,) = caplog.records
    return record.getMessage().removeprefix("[RANK 0] ")


def test_only_long_prunings_are_estimated(
    opened: Opened, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(estimating, "_SHORT_MACS", 100 * count_cost(opened.base.model).macs)
    estimating.log_estimate(opened, 100)
    assert not caplog.records
    estimating.log_estimate(opened, 101)
    line = line_of(caplog)
    assert line.startswith("estimate for 101 images: rotate 1 pass (")
    assert "score " in line and "evaluate 0.74 passes (" in line  # 50 of 101 images, by 1 + 1/2 models


def test_scores_alone_are_not_repaired(opened: Opened) -> None:
    whole, scores = estimating.estimate_cut(opened, 100), estimating.estimate_scores(opened, 100)
    assert scores.passes == {name: whole.passes[name] for name in ("rotate", "score")} and whole.passes["repair"] > 0
    assert scores.products == scores.stored_bytes == 0 < whole.products


def test_sizes_share_one_scoring(opened: Opened) -> None:
    shares = (0.8, 0.5, 0.2)
    prunes = [replace(opened.prune, target_macs=f"{100 * share:g}%") for share in shares]
    single = [estimating.estimate_cut(replace(opened, prune=prune), 100) for prune in prunes]
    sizes = estimating.estimate_sizes(opened, 100, shares)
    assert sizes.passes["score"] == single[0].passes["score"] and sizes.passes["rotate"] == 3
    assert sizes.passes["repair"] == pytest.approx(sum(cost.passes["repair"] for cost in single))
    assert sizes.products == pytest.approx(sum(cost.products for cost in single))
    assert sizes.passes["evaluate"] == pytest.approx(0.5 * (1 + sum(shares)))  # 50 images of 100; the base once


def test_training_counts_student_and_teacher(
    opened: Opened, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    images = ImageData(Dataset.from_dict({"label": [0] * 100}), Dataset.from_dict({"label": [0] * 50}), (), "", "")
    recipe = FinetuneRecipe(epochs=5, evaluate_every=2, batch_size=8)
    estimating.log_training(opened.base, images, recipe, opened.base, 1)
    assert not caplog.records
    monkeypatch.setattr(estimating, "_SHORT_MACS", 1)
    estimating.log_training(opened.base, images, recipe, opened.base, 1)
    line = line_of(caplog)
    # 5 epochs of 3 + 1 passes; 50 of 100 images before the first epoch and after epochs 2, 4 and 5.
    assert line.startswith("estimate for 100 images: train 20 passes (") and "evaluate 2 passes (" in line
    caplog.clear()
    short = replace(recipe, steps_per_epoch=5, teacher="none")
    estimating.log_training(opened.base, images, short, None, 1)
    assert line_of(caplog).startswith("estimate for 40 images: train 15 passes (")


def test_training_is_timed_as_it_runs(
    opened: Opened, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    timed: list[tuple[str, str | None, int]] = []

    def note(model: Any, images: float, *, batch_size: int, runtime: Runtime) -> float:
        timed.append((runtime.name, runtime.dtype, batch_size))
        return time_pass(model, images, batch_size=batch_size, runtime=runtime)

    monkeypatch.setattr(estimating, "_SHORT_MACS", 1)
    monkeypatch.setattr(estimating, "time_pass", note)
    images = ImageData(Dataset.from_dict({"label": [0] * 100}), None, (), "", "")
    for recipe in (FinetuneRecipe(batch_size=8), FinetuneRecipe(precision="bf16", channels_last=True, teacher="none")):
        estimating.log_training(opened.base, images, recipe, None, 1)
    assert timed == [("eager", None, 8), ("channels_last", "bf16", 16)]
    assert len(caplog.records) == 2
