"""Write the folder of a pruned module: `save_module`."""

import copy
import importlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import BaseImageProcessor

from isoprune_hf.checkpoint.dense import build_base
from isoprune_hf.checkpoint.folder import save_model_folder, write_file
from isoprune_hf.checkpoint.modeling_isoprune import IsoPruneConfig, IsoPruneForImageClassification
from isoprune_hf.checkpoint.plain_values import check_args
from isoprune_hf.errors import RecipeError
from isoprune_hf.pruning.plan import PruningPlan
from isoprune_hf.reporting.model_card import build_model_card


def save_module(
    folder: str | Path,
    module: nn.Module,
    config: IsoPruneConfig,
    processor: BaseImageProcessor | None,
    plan: PruningPlan,
) -> None:
    """Write the folder of a pruned module, whole or not at all; what its config builds must compute the same.

    Args:
        folder: Folder to write.
        module: The pruned module.
        config: Its config, with a base that builds it.
        processor: Image processor; None if there is none.
        plan: The plan.

    Raises:
        CheckpointError: The folder cannot be written, or its config builds a module that computes other outputs.
    """
    model = wrap(config, module)

    def finish(temporary: Path) -> None:
        write_file(temporary / "README.md", str(build_model_card(temporary, repo=Path(folder).name)))

    save_model_folder(folder, model, processor, plan=plan.to_json(), finish=finish)


def wrap(config: IsoPruneConfig, module: nn.Module) -> IsoPruneForImageClassification:
    """Return a pruned module as the model of its config; the module itself is not changed."""
    with torch.device("meta"):
        model = IsoPruneForImageClassification(copy.deepcopy(config))
    model.model = module
    model.training = module.training
    return model


def describe_class(
    builder: type[nn.Module], arguments: Mapping[str, Any] | None, module: nn.Module, params: int
) -> dict[str, Any]:
    """Return the entry `base` of a config for a module that a class of the caller builds.

    Args:
        builder: The class.
        arguments: Its arguments, by name.
        module: The pruned module.
        params: Parameters of the base.

    Raises:
        RecipeError: It is no class of `nn.Module` that another program can import, or does not build the base.
        CheckpointError: An argument is not a plain value.
    """
    if not isinstance(builder, type) or not isinstance(module, builder):
        raise RecipeError(
            f"builder must be the class of the module, {type(module).__name__}, got {builder!r:.99}; for a function, "
            "register it with timm.models.register_model"
        )
    place = builder.__module__
    if place == "__main__" or vars(importlib.import_module(place)).get(builder.__name__) is not builder:
        raise RecipeError(
            f"builder: {place}.{builder.__qualname__} cannot be imported by another program; move the class to the "
            "top level of a module"
        )
    args = dict(arguments or {})
    check_args(args)
    base = {"library": "python", "architecture": f"{place}:{builder.__name__}", "args": args}
    with torch.device("meta"):
        built = build_base(IsoPruneConfig(base=base))
    found = sum(parameter.numel() for parameter in built.parameters())
    if found != params:
        raise RecipeError(
            f"arguments: {builder.__name__} with {args} has {found:,} parameters, and the base that was pruned had "
            f"{params:,}; pass the arguments of that base"
        )
    return base
