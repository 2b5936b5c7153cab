# Copyright 2026 the isoprune_hf authors. Licensed under the Apache License, Version 2.0.
"""Find the class of a network that belongs to no library (part of the shipped file): `find_class`."""

import sys

from torch import nn

from isoprune_hf.errors import CheckpointError


def find_class(name: str) -> type[nn.Module]:
    """Return a class of a module that the program has already imported; nothing is imported here.

    Args:
        name: `package.module:Class`.

    Raises:
        CheckpointError: The module is not imported, or has no such class of `nn.Module`.
    """
    place, _, kind = name.partition(":")
    if place not in sys.modules:
        raise CheckpointError(f"config.base.architecture: {name!r:.99}: import {place:.99} first, which has the class")
    found = vars(sys.modules[place]).get(kind)
    if not isinstance(found, type) or not issubclass(found, nn.Module):
        raise CheckpointError(f"config.base.architecture: {place} has no class {kind!r:.99} of torch.nn.Module")
    return found
