"""Describe a cut model by its differences from the dense base; `difference.apply_structure` is the inverse."""

import copy
from typing import Any

import torch
from torch import nn

from isoprune_hf.checkpoint.difference import named_tensors
from isoprune_hf.checkpoint.meta import move_to_meta
from isoprune_hf.checkpoint.modeling_isoprune import IsoPruneConfig, IsoPruneForImageClassification, SkippedBlock
from isoprune_hf.errors import CheckpointError


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
        `shapes`: tensor name -> shape; `attributes`: module path -> {attribute: number or numbers}; `removed`: paths
        of the removed modules.
    """
    removed = [path for path, module in pruned.named_modules() if isinstance(module, SkippedBlock)]
    dense = named_tensors(base)
    shapes = {
        name: list(tensor.shape)
        for name, tensor in named_tensors(pruned).items()
        if list(tensor.shape) != list(dense[name].shape)
    }
    attributes: dict[str, dict[str, Any]] = {}
    modules = dict(pruned.named_modules())
    for path, module in base.named_modules():
        if path not in modules or path in removed:
            continue
        now = vars(modules[path])
        for name, value in vars(module).items():
            if not name.startswith("_") and _is_numbers(value) and now.get(name, value) != value:
                changed = now[name]
                attributes.setdefault(path, {})[name] = list(changed) if isinstance(changed, tuple | list) else changed
    return {"shapes": shapes, "attributes": attributes, "removed": removed}


def _is_numbers(value: Any) -> bool:
    numbers = value if isinstance(value, tuple | list) else (value,)
    return all(type(number) in (int, float) for number in numbers)
