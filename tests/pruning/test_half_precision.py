"""Bases stored in half precision: computed in float32, saved in their own type, and reopened bit for bit."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from helpers.marks import one_of_each
from helpers.plain_scores import Batches, batches_of
from helpers.tiny_models import TIMM, TRANSFORMERS, VIT, make_images
from safetensors.torch import save_file
from torch import nn
from transformers import AutoModelForImageClassification, TimmWrapperConfig, TimmWrapperForImageClassification

from isoprune_hf import PruneRecipe, load_base, prune_model, score_groups, trace_groups
from isoprune_hf.checkpoint.modeling_isoprune import IsoPruneForImageClassification
from isoprune_hf.models import BaseModel
from isoprune_hf.pruning.cutting import cut as cut_module
from isoprune_hf.pruning.cutting.cut import apply_plan
from isoprune_hf.pruning.graph import precision
from isoprune_hf.pruning.graph.precision import in_float32, in_stored_types
from isoprune_hf.pruning.scoring.criteria.registry import CRITERIA

LABELS = {index: f"class {index}" for index in range(7)}
ROPE = {"img_size": 28, "embed_dim": 48, "depth": 2, "num_heads": 4}
DTYPES = [torch.bfloat16, pytest.param(torch.float16, marks=pytest.mark.faults)]
BASES = one_of_each(["hf-vit", "timm-vit", "wrapped-rope"], "hf-vit")
BASES += one_of_each(["hf-swin", "timm-resnet"], mark="faults")
RECIPES = {
    "best": PruneRecipe(target_macs="50%", round_to=1),
    "taylor_bias": PruneRecipe(target_macs="50%", round_to=1, criterion="taylor", reconstruct="bias"),
}


def randomize(module: nn.Module) -> nn.Module:
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, tensor in module.state_dict().items():
            if name.endswith("running_var"):
                tensor.copy_(torch.rand(tensor.shape, generator=generator) + 0.5)
            elif tensor.is_floating_point():
                scale = 0.2 if tensor.ndim == 1 else tensor[0].numel() ** -0.5
                tensor.copy_(torch.randn(tensor.shape, generator=generator) * scale)
                if name.replace("weight", "running_var") in module.state_dict().keys() - {name}:
                    tensor.add_(1)  # with scales near 0 the logits of a ResNet differ by roundings only
    return module


def store(kind: str, dtype: torch.dtype, folder: Path) -> BaseModel:
    """Write a folder of a library with weights in half precision, and open it."""
    library, _, family = kind.partition("-")
    if library == "hf":
        config = type(TRANSFORMERS[kind])(**TRANSFORMERS[kind].to_diff_dict(), id2label=LABELS)
        randomize(AutoModelForImageClassification.from_config(config)).to(dtype).save_pretrained(folder)
    elif library == "wrapped":
        config = TimmWrapperConfig(architecture="eva02_tiny_patch14_224", model_args=ROPE, id2label=LABELS)
        randomize(TimmWrapperForImageClassification(config)).to(dtype).save_pretrained(folder)
    else:
        name, args = ("vit_tiny_patch16_224", VIT) if family == "vit" else ("resnet50", TIMM["resnet"][1])
        size = 16 if family == "vit" else 64
        module = randomize(timm.create_model(name, num_classes=7, **args)).to(dtype)
        folder.mkdir()
        save_file(module.state_dict(), folder / "model.safetensors")
        entries = {"architecture": name, "num_classes": 7, "model_args": args}
        entries["pretrained_cfg"] = {"input_size": [3, size, size], "num_classes": 7}
        (folder / "config.json").write_text(json.dumps(entries))
    return load_base(str(folder))


def batches_for(model: IsoPruneForImageClassification) -> Batches:
    return batches_of(model, [8, 8])


def logits(model: IsoPruneForImageClassification) -> torch.Tensor:
    with torch.no_grad():
        return model(make_images(model, 8, seed=9)).logits


@pytest.mark.parametrize("recipe", one_of_each(RECIPES, "best", mark="faults"))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", BASES)
def test_half_base_is_pruned_in_its_own_type(kind: str, dtype: torch.dtype, recipe: str, tmp_path: Path) -> None:
    base = store(kind, dtype, tmp_path / "base")
    before = {name: tensor.clone() for name, tensor in base.model.state_dict().items()}
    assert base.model.dtype == dtype
    result = prune_model(base.model, RECIPES[recipe], batches_for(base.model))

    assert all(torch.equal(tensor, before[name]) for name, tensor in base.model.state_dict().items())
    pruned = result.model.state_dict()
    assert all(pruned[name].dtype == tensor.dtype for name, tensor in before.items() if name in pruned)
    assert all(tensor.isfinite().all() for tensor in pruned.values())
    cut = apply_plan(base.model, result.plan)
    errors = [float((logits(model) - logits(base.model)).float().norm()) for model in (result.model, cut)]
    assert errors[0] < errors[1]

    result.save(tmp_path / "pruned", base.processor)
    again = load_base(str(tmp_path / "pruned")).model
    assert torch.equal(logits(again), logits(result.model))
    assert {name: tensor.dtype for name, tensor in again.state_dict().items()} == {
        name: tensor.dtype for name, tensor in pruned.items()
    }


@pytest.mark.parametrize("criterion", one_of_each(sorted(CRITERIA), "gate_fisher_joint", "hessian", "l1", "taylor"))
def test_half_base_scores_are_those_in_float32(criterion: str, tmp_path: Path) -> None:
    model = store("timm-resnet", torch.bfloat16, tmp_path / "base").model
    batches, groups = batches_for(model), trace_groups(model)
    found = score_groups(model, groups, criterion=criterion, batches=batches)
    expected = score_groups(in_float32(model).float(), groups, criterion=criterion, batches=batches)
    assert found.scores.keys() == expected.scores.keys() and found.scores
    assert all(torch.equal(score, expected.scores[name]) for name, score in found.scores.items())
    assert found.fingerprint != expected.fingerprint


def test_new_head_has_the_type_of_the_base(tmp_path: Path) -> None:
    store("hf-vit", torch.bfloat16, tmp_path / "base")
    model = load_base(str(tmp_path / "base"), num_labels=3).model
    assert {tensor.dtype for tensor in model.state_dict().values()} == {torch.bfloat16}


def test_values_too_large_for_float16_stay_in_float32(tmp_path: Path) -> None:
    model = store("hf-vit", torch.float16, tmp_path / "base").model
    wide = in_float32(model)
    same, notes = in_stored_types(wide, model)
    assert same.dtype == torch.float16 and notes == ()
    with torch.no_grad():
        wide.model.classifier.weight[0, 0] = 1e6
    same, notes = in_stored_types(wide, model)
    assert same is wide and len(notes) == 1 and "classifier.weight" in notes[0]


@pytest.mark.parametrize(
    "criterion",
    one_of_each(sorted(name for name, method in CRITERIA.items() if not method.reads_images), "l1", "bn_scale"),
)
def test_recipes_without_images_copy_no_base(criterion: str, tmp_path: Path, monkeypatch) -> None:
    model = store("timm-resnet", torch.bfloat16, tmp_path / "base").model
    recipe = PruneRecipe(criterion=criterion, target_macs="50%", round_to=1)
    expected = prune_model(in_float32(model), recipe)
    types: set[torch.dtype] = set()
    monkeypatch.setattr(cut_module, "copy_modules", record_types(types, cut_module.copy_modules))
    monkeypatch.setattr(precision, "copy_modules", record_types(types, precision.copy_modules))
    result = prune_model(model, recipe)
    assert torch.float32 not in types and torch.bfloat16 in types
    assert (result.plan.kept, result.plan.heads) == (expected.plan.kept, expected.plan.heads) and result.plan.kept
    wanted = expected.model.state_dict()
    assert all(
        torch.equal(tensor, wanted[name].to(tensor.dtype)) for name, tensor in result.model.state_dict().items()
    )


def record_types(types: set[torch.dtype], copy: Callable[..., nn.Module]) -> Callable[..., nn.Module]:
    """Return a `copy_modules` that collects the types of the parameters of its results."""

    def recorded(*args: Any, **options: Any) -> nn.Module:
        copied = copy(*args, **options)
        types.update(parameter.dtype for parameter in copied.parameters())
        return copied

    return recorded


def test_float32_base_is_not_copied(tmp_path: Path) -> None:
    model = store("hf-vit", torch.float32, tmp_path / "base").model
    assert in_float32(model) is model and in_stored_types(model, model) == (model, ())
