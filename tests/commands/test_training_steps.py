"""Checkpoints of a training: which are uploaded, and what happens if one cannot be written."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from accelerate import Accelerator
from helpers.tiny_models import TIMM
from torch import nn

from isoprune_hf.commands.steps import training
from isoprune_hf.commands.steps.training import Checkpoints, train_student, writing_result
from isoprune_hf.errors import CheckpointError, ConflictError, WriteError
from isoprune_hf.models import BaseModel, load_base
from isoprune_hf.recipes import DataRecipe, FinetuneRecipe


class Offers:
    """Uploads that record what they are offered."""

    def __init__(self) -> None:
        self.offered: list[tuple[Path, int]] = []

    def offer(self, folder: Path, epoch: int) -> None:
        self.offered.append((folder, epoch))


@pytest.fixture(scope="module")
def student() -> BaseModel:
    return load_base(TIMM["vit"][0], False, model_args=TIMM["vit"][1])


def test_only_last_checkpoint_is_offered(student: BaseModel, tmp_path: Path) -> None:
    uploads: Any = Offers()
    for name in ("last", "best"):
        Checkpoints(tmp_path, uploads=uploads).save(name, student, 3)
    assert uploads.offered == [(tmp_path / "last", 3)]
    assert {path.name for path in tmp_path.iterdir()} == {"last", "best"}


def test_only_resumable_run_survives_unwritten_checkpoint(
    student: BaseModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*arguments: object) -> None:
        raise CheckpointError("no space")

    monkeypatch.setattr(training, "save_model_folder", fail)
    with pytest.raises(CheckpointError, match="no space"):
        Checkpoints(tmp_path).save("last", student, 1)
    Accelerator(cpu=True)  # its logger needs the ranks
    run: Any = SimpleNamespace()
    Checkpoints(tmp_path, run).save("last", student, 1)


def test_checkpoint_needs_isoprune_model(student: BaseModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def finetune(*arguments: object, save: Any, **settings: object) -> None:
        save("last", nn.Linear(1, 1), {"epoch": 1})

    monkeypatch.setattr(training, "finetune", finetune)
    images: Any = SimpleNamespace(train=None, evaluation=None)
    checkpoints = Checkpoints(tmp_path / "checkpoints")
    with pytest.raises(TypeError, match="Linear"):
        train_student(student, images, DataRecipe(), FinetuneRecipe(), Accelerator(cpu=True), checkpoints=checkpoints)


@pytest.mark.parametrize("error", [CheckpointError, WriteError])
@pytest.mark.parametrize("has_state", [True, False])
def test_unwritten_result_promises_only_a_saved_training(has_state: bool, error: type[CheckpointError]) -> None:
    run: Any = SimpleNamespace(has_state=has_state)
    with pytest.raises(WriteError) as caught, writing_result(run):
        raise error("no space")
    assert ("the training is saved" in str(caught.value)) is has_state
    with pytest.raises(ConflictError, match=r"^complete elsewhere$"), writing_result(run):
        raise ConflictError("complete elsewhere")
