"""Run a module with other tensors instead of its parameters (`replaced_parameters`).

`torch.func.functional_call` follows the path of each parameter, so it damages a network in which one module has two
names, and it misses the lists in which recurrent layers keep their weights. Here every place that holds a parameter is
found by identity, changed, and restored.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn


@contextmanager
def replaced_parameters(module: nn.Module, values: Mapping[str, torch.Tensor]) -> Iterator[None]:
    """Replace parameters of a module and its parts by other tensors, wherever they hold them.

    Args:
        module: Restored afterwards, also if its forward pass fails.
        values: Name of a parameter -> tensor; any one of the names of a parameter that has several.
    """
    named = dict(module.named_parameters(remove_duplicate=False)) if values else {}
    new = {id(named[name]): value for name, value in values.items()}
    places: list[tuple[Any, Any, Any]] = []
    lists: list[tuple[dict[str, Any], str, list[Any]]] = []
    for owner in module.modules() if new else ():
        for attribute, container in vars(owner).items():
            if isinstance(container, dict | list):
                entries = container.items() if isinstance(container, dict) else enumerate(container)
                found = [(container, key, entry) for key, entry in entries if id(entry) in new]
                places += found
                if found and isinstance(container, list):
                    lists.append((vars(owner), attribute, container))
    try:
        for container, key, entry in places:
            container[key] = new[id(entry)]
        yield
    finally:
        for attributes, name, container in lists:  # a recurrent layer makes a new list when its weights change
            attributes[name] = container
        for container, key, entry in places:
            container[key] = entry
