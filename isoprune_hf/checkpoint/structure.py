"""Describe a cut model by its differences from the dense base; `difference.apply_structure` is the inverse."""

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from isoprune_hf.checkpoint.difference import named_tensors, number_tables
from isoprune_hf.checkpoint.meta import move_to_meta
from isoprune_hf.checkpoint.modeling_isoprune import (
    IsoPruneConfig,
    IsoPruneForImageClassification,
    SkippedBlock,
    model_class_of,
)
from isoprune_hf.checkpoint.pretrained import IsoPrunePreTrainedModel
from isoprune_hf.checkpoint.task_forms import IMAGE_CLASSIFICATION, task_of
from isoprune_hf.errors import CheckpointError


def as_saved(config: IsoPruneConfig, network: nn.Module) -> IsoPrunePreTrainedModel:
    """Return a network as the model that its folder opens as; the network itself is shared and not changed.

    Args:
        config: Its config, which the model gets a copy of.
        network: The network.
    """
    config = copy.deepcopy(config)
    if task_of(config.base) is not IMAGE_CLASSIFICATION:
        config.format_version = max(config.format_version, 3)
    with torch.device("meta"):
        model = model_class_of(config)(config)
    model.model = network
    model.training = network.training
    return model


def image_size_of(model: IsoPruneForImageClassification) -> list[int]:
    """Return (channels, height, width) of the images that `model` was built for.

    Raises:
        CheckpointError: The config has no image size, as in a config that was written by hand.
    """
    size = model.config.image_size
    if size is None:
        raise CheckpointError("config.image_size: missing; needs [channels, height, width]")
    return size


def meta_copy(model: IsoPruneForImageClassification, *, dense: bool = False) -> IsoPruneForImageClassification:
    """Build the architecture of `model` on the meta device, without weights, in eval mode.

    Args:
        model: Model to copy.
        dense: Build the dense base of the model, without its structure.
    """
    config = copy.deepcopy(model.config)
    if dense:
        config.structure = None
    with torch.device("meta"):
        copied = type(model)(config)
    move_to_meta(copied)
    copied.eval()  # type: ignore[no-untyped-call]  # untyped in transformers
    return copied


def is_cut(config: IsoPruneConfig) -> bool:
    """Return whether a config describes a cut model: it has a structure, or a uniform layout, which needs none."""
    return config.layout == "uniform" or any((config.structure or {}).values())


def capture_structure(base: nn.Module, pruned: nn.Module) -> dict[str, Any]:
    """Return the differences between `pruned` and `base`.

    Args:
        base: The dense architecture; only shapes and attributes are read.
        pruned: The same architecture after a cut.

    Returns:
        `shapes`: tensor name -> shape; `attributes`: module path -> {attribute, or CONFIG.ENTRY: number or numbers};
        `removed`: paths of the removed modules. A config that several modules share is listed for the first of them.
    """
    missing = dict(base.named_modules()).keys() - dict(pruned.named_modules()).keys()
    removed = [path for path, module in pruned.named_modules() if isinstance(module, SkippedBlock)]
    dense = named_tensors(base)
    shapes = {
        name: list(tensor.shape)
        for name, tensor in named_tensors(pruned).items()
        if name not in dense or list(tensor.shape) != list(dense[name].shape)
    }
    attributes: dict[str, dict[str, Any]] = {}
    now = number_tables(pruned)
    for (path, table), before in number_tables(base, {*removed, *missing}).items():
        prefix = f"{table}." if table else ""
        for name, value in _changed_numbers(before, now.get((path, table), {})).items():
            attributes.setdefault(path, {})[prefix + name] = value
    return {"shapes": shapes, "attributes": attributes, "removed": removed}


def _changed_numbers(before: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, Any]:
    """Return the numbers of a table that differ from those before; tuples become lists, as in JSON."""
    changed = {
        name: now[name]
        for name, value in before.items()
        if isinstance(name, str) and not name.startswith("_") and _is_numbers(value) and now.get(name, value) != value
    }
    return {name: list(value) if isinstance(value, tuple) else value for name, value in changed.items()}


def _is_numbers(value: Any) -> bool:
    numbers = value if isinstance(value, tuple | list) else (value,)
    return all(type(number) in (int, float) for number in numbers)
