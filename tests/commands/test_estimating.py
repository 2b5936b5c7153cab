"""The estimate before a pruning."""

import logging
from pathlib import Path
from types import SimpleNamespace

import pytest
from accelerate import Accelerator
from helpers.tiny_models import make_base

from isoprune_hf.commands.steps import estimating
from isoprune_hf.commands.steps.opening import Opened
from isoprune_hf.models import BaseModel
from isoprune_hf.pruning.cost.macs import count_cost
from isoprune_hf.recipes import DataRecipe, PruneRecipe


def test_only_long_prunings_are_estimated(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make_base("vit", tmp_path)
    base, images = BaseModel(model, SimpleNamespace()), SimpleNamespace(evaluation=range(50))
    opened = Opened(
        PruneRecipe(target_macs="50%").settled(has_images=True),
        DataRecipe(),
        images,
        base,
        None,
        "criterion",
        Accelerator(cpu=True),
    )
    monkeypatch.setattr(estimating, "_SHORT_MACS", 100 * count_cost(model).macs)
    with caplog.at_level(logging.INFO, "isoprune_hf"):
        estimating.log_estimate(opened, 100)
        assert not caplog.records
        estimating.log_estimate(opened, 101)
    (line,) = [record.getMessage() for record in caplog.records]
    assert line.removeprefix("[RANK 0] ").startswith("estimate for 101 images: rotate 1 pass (")
    assert "score " in line and "evaluate 0.74 passes (" in line  # 50 of 101 images, by 1 + 1/2 models
