# Copyright 2026 the isoprune_hf authors. Licensed under the Apache License, Version 2.0.
"""Open a pruned model with another number of classes (part of the shipped file): `fit_classes`."""

import copy
from typing import Any

import torch
from torch import nn

from isoprune_hf.checkpoint.dense import IsoPruneConfig, build_base


def find_class_dims(config: IsoPruneConfig) -> dict[str, list[bool]]:
    """Find the dimensions that count classes: those that differ if the base is built with one class more.

    Returns:
        Name of each tensor with such a dimension -> for each of its dimensions, whether it counts classes.
    """
    base = config.base or {}
    if base.get("library") == "python" and "num_classes" not in (base.get("args") or {}):
        return {}  # its builder builds one number of classes
    shapes = []
    for count in ((config.num_labels or 1), (config.num_labels or 1) + 1):
        counted = copy.deepcopy(config)
        counted.num_labels = count
        with torch.device("meta"):
            shapes.append({name: tensor.shape for name, tensor in build_base(counted).state_dict().items()})
    first, second = shapes
    return {
        name: [a != b for a, b in zip(shape, second[name], strict=True)]
        for name, shape in first.items()
        if shape != second[name]
    }


def fit_classes(config: IsoPruneConfig, base: nn.Module) -> dict[str, Any] | None:
    """Return the structure of `config` with the classes of `config.num_labels` in the shapes of the head.

    A folder lists the shapes of its head with the classes that it was saved with; `from_pretrained(num_labels=...)`
    asks for others.

    Args:
        config: The config, whose structure may be of another number of classes.
        base: The dense architecture of `config`.
    """
    structure = config.structure or {}
    shapes, classes = structure.get("shapes"), config.num_labels
    if not isinstance(shapes, dict):
        return config.structure
    full = {name: list(tensor.shape) for name, tensor in base.state_dict().items()}
    others = [
        name
        for name, shape in shapes.items()
        if isinstance(shape, list)
        and name in full
        and len(shape) == len(full[name])
        and any(size != limit == classes for size, limit in zip(shape, full[name], strict=True))
    ]
    if not others:
        return config.structure
    dims = find_class_dims(config)
    fitted = {
        name: [
            limit if counts else size for size, limit, counts in zip(shapes[name], full[name], dims[name], strict=True)
        ]
        for name in others
        if name in dims
    }
    return {**structure, "shapes": {**shapes, **fitted}}
