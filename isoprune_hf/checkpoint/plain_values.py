# Copyright 2026 the isoprune_hf authors. Licensed under the Apache License, Version 2.0.
"""Check the plain values in a config: `require`, `is_plain`, `check_args` (part of the shipped file)."""

import json
import re
from collections.abc import Iterator
from typing import Any

from isoprune_hf.errors import CheckpointError
from isoprune_hf.limits import MAX_CONFIG_NUMBER

# Arguments of timm and torchvision builders that would read files or the network, or change the kind of model.
_FORBIDDEN_TO_OWN = re.compile("pretrained.*|weights.*|checkpoint_path|cache_dir|features_only|scriptable")
FORBIDDEN_ARGUMENTS = re.compile(f"{_FORBIDDEN_TO_OWN.pattern}|num_classes")


def require(holds: bool, message: str) -> None:
    """Raise a CheckpointError with `message` unless the condition holds."""
    if not holds:
        raise CheckpointError(message)


def check_args(args: dict[str, Any], *, is_own: bool = False) -> dict[str, Any]:
    """Check that the arguments of a builder are plain values, and return a copy of them for one call of the builder.

    A builder gets the same values at first and from config.json: lists in place of nested tuples, tuples in place of
    outer lists.

    Args:
        args: The arguments, by name.
        is_own: The builder is one of the caller, whose number of classes is an argument.

    Raises:
        CheckpointError: An argument would read files, would change the kind of model, or is not a plain value of a
            usual size, possibly in nested lists and mappings.
    """
    forbidden = _FORBIDDEN_TO_OWN if is_own else FORBIDDEN_ARGUMENTS
    for key, value in args.items():
        named = f"config.base.args: {key}={value!r:.99}"
        require(
            not any(map(forbidden.fullmatch, map(str, (key, *_keys(value))))),
            f"{named} is not allowed",
        )
        require(
            all(isinstance(name, str) for name in (key, *_keys(value))) and is_plain(value),
            f"{named} is not allowed; config.json holds text, numbers of at most {MAX_CONFIG_NUMBER}, None, and lists "
            "and mappings of these",
        )
    copied: dict[str, Any] = json.loads(json.dumps(args))
    return {key: tuple(value) if isinstance(value, list) else value for key, value in copied.items()}


def _keys(value: Any) -> Iterator[Any]:
    """Yield the keys of all mappings in a value."""
    if isinstance(value, dict):
        yield from value
        value = list(value.values())
    if isinstance(value, list | tuple):
        for part in value:
            yield from _keys(part)


def is_plain(value: Any) -> bool:
    """Return whether a value is None, text, a number of usual size, or a sequence or mapping of these."""
    values = list(value.values()) if isinstance(value, dict) else value
    if isinstance(values, list | tuple):
        return all(map(is_plain, values))
    is_number = isinstance(value, int | float) and abs(value) <= MAX_CONFIG_NUMBER  # neither inf nor nan
    return value is None or isinstance(value, str) or is_number
