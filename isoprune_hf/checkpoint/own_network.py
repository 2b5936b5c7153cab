# Copyright 2026 the isoprune_hf authors. Licensed under the Apache License, Version 2.0.
"""Networks that belong to no library (part of the shipped file): `allow_builder`, `find_builder` and `call_on`.

A config names the builder of such a network, and nothing is imported or called by that name: the program that opens
the folder passes the builder again.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from isoprune_hf.checkpoint.plain_values import is_plain, require
from isoprune_hf.errors import CheckpointError
from isoprune_hf.limits import MAX_INPUT_NUMBERS

Builder = Callable[..., nn.Module]
Inputs = list[tuple[str | None, list[int]]]  # keyword, or None for an input by position, and shape without the batch
_BUILDERS: dict[str, Builder] = {}  # those that the program has passed, by the names in the configs
_MAX_INPUTS = 64


def allow_builder(name: Any, builder: Builder) -> None:
    """Register the builder of the configs that name it, for the rest of the program.

    Args:
        name: `package.module:builder`.
        builder: Class or function that returns the network.

    Raises:
        CheckpointError: The config names no builder.
    """
    require(isinstance(name, str), f"builder: config.base.architecture is {name!r:.99}, and names no builder")
    _BUILDERS[name] = builder


def find_builder(name: str) -> Builder:
    """Return the builder that the program has passed for a name.

    Raises:
        CheckpointError: It has passed none.
    """
    if name not in _BUILDERS:
        raise CheckpointError(
            f"config.base.architecture: the network is built by {name!r:.99}; import that and pass it as "
            "from_pretrained(..., builder=...)"
        )
    return _BUILDERS[name]


def with_classes(args: dict[str, Any], saved: Any, wanted: int | None) -> dict[str, Any]:
    """Return the arguments of a builder for a number of classes.

    Args:
        args: The arguments for the classes that the network was saved with.
        saved: How many these are; None if that is not recorded.
        wanted: The number of classes.

    Raises:
        CheckpointError: It is another number, and no argument `num_classes` says how to build it.
    """
    if saved is None or saved == wanted:
        return args
    require(
        type(saved) is int and args.get("num_classes") == saved,
        f"config.num_labels: the network has {saved!r:.99} classes, got {wanted}; only a builder that is saved with "
        "an argument num_classes builds another number",
    )
    return {**args, "num_classes": wanted}


def inputs_of(base: dict[str, Any] | None, image_size: list[int] | None) -> Inputs:
    """Return the inputs of a network.

    Args:
        base: The entry `base` of a config.
        image_size: The entry `image_size`: the shape of a single input.

    Raises:
        CheckpointError: The entry `base.inputs` is no list of such pairs.
    """
    stored = (base or {}).get("inputs")
    if stored is None:
        return [(None, image_size or [])]
    is_list = isinstance(stored, list) and 1 <= len(stored) <= _MAX_INPUTS
    require(
        is_list and all(map(_is_input, stored)), f"config.base.inputs: {stored!r:.99} does not list name and shape"
    )
    numbers = sum(math.prod(shape) for _, shape in stored)
    require(
        numbers <= MAX_INPUT_NUMBERS, f"config.base.inputs: {numbers} numbers, at most {MAX_INPUT_NUMBERS} are read"
    )
    return [(name, shape) for name, shape in stored]


def call_on(network: nn.Module, inputs: Inputs, make: Callable[[list[int]], torch.Tensor]) -> Any:
    """Run a network on inputs that are made from their shapes."""
    made = [(name, make(shape)) for name, shape in inputs]
    named = {name: value for name, value in made if name is not None}
    return network(*(value for name, value in made if name is None), **named)


def _is_input(entry: Any) -> bool:
    if not isinstance(entry, list) or len(entry) != 2:
        return False
    name, shape = entry
    is_shape = isinstance(shape, list) and all(type(size) is int and size >= 1 for size in shape) and is_plain(shape)
    return is_shape and (name is None or (isinstance(name, str) and name.isidentifier()))
