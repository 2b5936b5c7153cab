"""Write the folder of a pruned module: `save_module`."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import BaseImageProcessor, ProcessorMixin

from isoprune_hf.checkpoint.dense import build_base
from isoprune_hf.checkpoint.folder import save_model_folder, write_file
from isoprune_hf.checkpoint.modeling_isoprune import IsoPruneConfig
from isoprune_hf.checkpoint.own_network import Builder, allow_builder
from isoprune_hf.checkpoint.plain_values import check_args
from isoprune_hf.checkpoint.structure import as_saved
from isoprune_hf.errors import RecipeError
from isoprune_hf.models.calling import CallForm
from isoprune_hf.pruning.plan import PruningPlan
from isoprune_hf.reporting.model_card import build_model_card
from isoprune_hf.reporting.ornaments import ornament


def save_module(
    folder: str | Path,
    module: nn.Module,
    config: IsoPruneConfig,
    processor: BaseImageProcessor | ProcessorMixin | None,
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
    model = as_saved(config, module)

    def finish(temporary: Path) -> None:
        with ornament("the model card"):
            write_file(temporary / "README.md", str(build_model_card(temporary, repo=Path(folder).name)))

    save_model_folder(folder, model, processor, plan=plan.to_json(), finish=finish)


def describe_builder(
    builder: Builder, arguments: Mapping[str, Any] | None, module: nn.Module, params: int
) -> dict[str, Any]:
    """Return the entry `base` of a config for a module that a class or function of the caller builds.

    Args:
        builder: The class or function.
        arguments: Its arguments, by name.
        module: The pruned module.
        params: Parameters of the base.

    Raises:
        RecipeError: Another program cannot import it, or it does not build the base.
        CheckpointError: An argument is not a plain value.
    """
    place, name = getattr(builder, "__module__", None), getattr(builder, "__qualname__", None)
    if not isinstance(place, str) or not isinstance(name, str) or "<" in name:
        raise RecipeError(
            f"builder: {builder!r:.99} cannot be imported by another program; move the class or function to the top "
            "level of a module"
        )
    args = dict(arguments or {})
    check_args(args, is_own=True)
    base = {"library": "python", "architecture": f"{place}:{name}", "args": args}
    allow_builder(base["architecture"], builder)
    with torch.device("meta"):
        built = build_base(IsoPruneConfig(base=base))
    found = sum(parameter.numel() for parameter in built.parameters())
    if type(built) is not type(module) or found != params:
        raise RecipeError(
            f"builder: {name} with {args} returns a {type(built).__name__} of {found:,} parameters, and the base that "
            f"was pruned is a {type(module).__name__} of {params:,}; pass the builder and the arguments of that base"
        )
    return base


def describe_inputs(form: CallForm) -> dict[str, Any]:
    """Return the entry `inputs` of the base of a config, or nothing for a single input by position."""
    if form.names == (None,):
        return {}
    return {"inputs": [[name, [*shape]] for name, shape in zip(form.names, form.shapes, strict=True)]}
