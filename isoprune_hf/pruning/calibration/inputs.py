"""The tensor that a layer reads, found among the arguments of its call whether it was given by position or by name.

Forward hooks that read or replace it are registered with `with_kwargs=True`.
"""

from collections.abc import Mapping
from typing import Any

import torch


def first_tensor(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> torch.Tensor | None:
    """Return the first tensor among the arguments of a module, or None."""
    return next((value for value in (*args, *kwargs.values()) if isinstance(value, torch.Tensor)), None)


def read_tensor(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> torch.Tensor:
    """Return the first tensor among the arguments of a module.

    Raises:
        RuntimeError: There is none.
    """
    found = first_tensor(args, kwargs)
    if found is None:
        raise RuntimeError("the module was called without a tensor")
    return found


def replace_first_tensor(
    args: tuple[Any, ...], kwargs: Mapping[str, Any], value: torch.Tensor
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return the arguments of a module with another tensor at the place of the first one.

    Raises:
        RuntimeError: There is no tensor.
    """
    found = read_tensor(args, kwargs)
    place = next((position for position, arg in enumerate(args) if arg is found), None)
    if place is not None:
        return (*args[:place], value, *args[place + 1 :]), dict(kwargs)
    name = next(name for name, arg in kwargs.items() if arg is found)
    return args, {**kwargs, name: value}
