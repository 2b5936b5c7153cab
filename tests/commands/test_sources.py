"""A pruned model finds the base that it was cut from, from any working directory, or says that it does not."""

from collections.abc import Callable
from pathlib import Path

import pytest
import timm
import torch
from accelerate import PartialState
from helpers.bases import TINY, assert_same, save_timm, weights
from helpers.tiny_models import VIT

from isoprune_hf.checkpoint.modeling_isoprune import IsoPruneForImageClassification
from isoprune_hf.commands.steps.sources import open_teacher
from isoprune_hf.errors import RecipeError
from isoprune_hf.models import BaseModel, load_base
from isoprune_hf.pruning.prune import prune_model
from isoprune_hf.recipes import FinetuneRecipe, PruneRecipe

AUTO = FinetuneRecipe(teacher="auto", distillation="soft")


def cut(base: BaseModel, folder: Path) -> IsoPruneForImageClassification:
    """Cut a base, save the result, and open it again."""
    recipe = PruneRecipe(criterion="l1", ratio=0.5, round_to=1)
    prune_model(base.model, recipe).save(folder / "pruned", base.processor)
    return load_base(str(folder / "pruned")).model


def from_folder(tmp_path: Path) -> BaseModel:
    return load_base(save_timm(tmp_path).name)


def from_own_folder(tmp_path: Path) -> BaseModel:
    """Open a dense folder whose weights were trained after the architecture was opened."""
    base = load_base(TINY, pretrained=False, model_args=VIT, num_labels=4)
    torch.nn.init.normal_(base.model.model.head.weight)
    base.model.save_pretrained(tmp_path / "own")
    base.processor.save_pretrained(tmp_path / "own")
    return load_base("own")


def from_file(tmp_path: Path) -> BaseModel:
    torch.manual_seed(2)
    torch.save(timm.create_model("vit_tiny_patch16_224", num_classes=3, **VIT).state_dict(), tmp_path / "w.pth")
    return load_base(TINY, model_args=VIT, weights="w.pth")


@pytest.mark.parametrize("road", [from_folder, from_own_folder, from_file], ids=lambda road: road.__name__)
def test_teacher_is_found_from_another_directory(
    road: Callable[[Path], BaseModel], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    base = road(tmp_path)
    student = cut(base, tmp_path)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    teacher = open_teacher(student, AUTO)
    assert teacher is not None
    assert_same(weights(teacher.model.model), weights(base.model.model))


def test_base_that_is_gone_is_an_error(tmp_path: Path) -> None:
    folder = save_timm(tmp_path)
    student = cut(load_base(str(folder)), tmp_path)
    folder.rename(tmp_path / "moved")
    with pytest.raises(RecipeError, match=r"finetune\.teacher"):
        open_teacher(student, AUTO)
    named = FinetuneRecipe(teacher=str(tmp_path / "moved"), distillation="soft")
    assert open_teacher(student, named) is not None


def test_base_trained_after_opening_is_an_error(tmp_path: Path) -> None:
    base = load_base(TINY, pretrained=False, model_args=VIT)
    torch.nn.init.normal_(base.model.model.head.weight)
    with pytest.raises(RecipeError, match=r"finetune\.teacher"):
        open_teacher(cut(base, tmp_path), AUTO)


def test_untrained_base_does_not_teach(tmp_path: Path) -> None:
    PartialState()  # for the loggers of accelerate
    assert open_teacher(cut(load_base(TINY, pretrained=False, model_args=VIT), tmp_path), AUTO) is None


def test_unknown_base_is_an_error(tmp_path: Path) -> None:
    student = cut(load_base(TINY, pretrained=False, model_args=VIT), tmp_path)
    student.config.source = {}
    with pytest.raises(RecipeError, match=r"finetune\.teacher"):
        open_teacher(student, AUTO)
