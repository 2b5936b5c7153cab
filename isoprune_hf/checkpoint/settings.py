# Copyright 2026 the isoprune_hf authors. Licensed under the Apache License, Version 2.0.
"""Record and restore attributes and modules of a base that were set after its constructor.

`capture_settings` finds them by comparing two networks, `apply_settings` sets them (part of the shipped file).
"""

import re
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from torch import nn

from isoprune_hf.checkpoint.plain_values import FORBIDDEN_ARGUMENTS, is_plain, require

_ACTIVATIONS = (
    nn.CELU,
    nn.ELU,
    nn.GELU,
    nn.Hardsigmoid,
    nn.Hardswish,
    nn.Hardtanh,
    nn.Identity,
    nn.LeakyReLU,
    nn.LogSigmoid,
    nn.Mish,
    nn.ReLU,
    nn.ReLU6,
    nn.SELU,
    nn.SiLU,
    nn.Sigmoid,
    nn.Softplus,
    nn.Softsign,
    nn.Tanh,
)
_POOLS = (nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d, nn.AvgPool2d, nn.MaxPool2d)
# Name of a module type that may stand in place of a module of the base -> builds one; its attributes follow.
REPLACEMENTS: dict[str, Callable[[], nn.Module]] = {
    **{kind.__name__: kind for kind in _ACTIVATIONS},
    **{kind.__name__: partial(kind, 1) for kind in _POOLS},
}
# Rates of training, which a recipe sets and no output depends on.
TRAINING_RATES = {
    "attn_drop_rate",
    "drop_path_rate",
    "drop_prob",
    "drop_rate",
    "p",
    "pos_drop_rate",
    "proj_drop_rate",
}
_TEXT = re.compile(r"[\w.+-]{0,64}", re.ASCII)


def capture_settings(built: nn.Module, network: nn.Module) -> dict[str, Any]:
    """Return the attributes and module types of a network that differ from those of another one.

    Args:
        built: The network that a config builds.
        network: A network of the same architecture; only types and attributes are read.

    Returns:
        `settings`: module path -> {attribute: plain value}; `modules`: module path -> name of a type in
        `REPLACEMENTS`, or None for a module that the network does not have. Entries without content are left out.
        Whatever else differs is not part of the result.
    """
    theirs = dict(network.named_modules(remove_duplicate=False))
    settings: dict[str, dict[str, Any]] = {}
    modules: dict[str, str | None] = {}
    for path, module in built.named_modules(remove_duplicate=False):
        if any(path.startswith(f"{replaced}.") for replaced in modules):
            continue
        other = theirs.get(path)
        if other is None:
            modules[path] = None
            continue
        if type(other) is not type(module) and _is_replacement(other):
            modules[path] = type(other).__name__
            module = REPLACEMENTS[type(other).__name__]()
        changed = _changed_values(module, other)
        if changed:
            settings[path] = changed
    return {name: found for name, found in (("settings", settings), ("modules", modules)) if found}


def merge_settings(base: Mapping[str, Any], found: Mapping[str, Any]) -> dict[str, Any]:
    """Return the entry `base` of a config with settings that were found in addition to its own."""
    modules = {**(base.get("modules") or {}), **found.get("modules", {})}
    settings = {
        path: dict(values)
        for path, values in (base.get("settings") or {}).items()
        if not any(f"{path}.".startswith(f"{replaced}.") for replaced in found.get("modules", {}))
    }
    for path, values in found.get("settings", {}).items():
        settings[path] = {**settings.get(path, {}), **values}
    merged = {name: value for name, value in (("settings", settings), ("modules", modules)) if value}
    return {**{name: value for name, value in base.items() if name not in ("settings", "modules")}, **merged}


def apply_settings(network: nn.Module, base: Mapping[str, Any]) -> nn.Module:
    """Set the attributes and modules that the entry `base` of a config names, in place, and return the network.

    Raises:
        CheckpointError: An entry names a module or attribute that the network does not have, or another value than a
            plain one.
    """
    for name in ("settings", "modules"):
        require(isinstance(base.get(name), dict | None), f"config.base.{name}: {base.get(name)!r:.99} is no mapping")
    for path, kind in (base.get("modules") or {}).items():
        where = f"config.base.modules[{path!r:.99}]"
        known = isinstance(path, str) and path in dict(network.named_modules(remove_duplicate=False))
        require(known and path != "", f"{where}: the base has no such module")
        require(
            kind is None or (isinstance(kind, str) and kind in REPLACEMENTS),
            f"{where}: {kind!r:.99} is not one of {', '.join(REPLACEMENTS)}",
        )
        parent, _, leaf = path.rpartition(".")
        owner = network.get_submodule(parent)
        owner._modules[leaf] = None if kind is None else REPLACEMENTS[kind]().train(network.training)
    modules = dict(network.named_modules(remove_duplicate=False))
    for path, entries in (base.get("settings") or {}).items():
        where = f"config.base.settings[{path!r:.99}]"
        require(path in modules and isinstance(entries, dict), f"{where}: the base has no such module")
        for name, value in entries.items():
            _set(modules[path], name, value, where=f"{where}[{name!r:.99}]")
    return network


def _is_replacement(module: nn.Module) -> bool:
    kind = type(module)
    return kind.__module__.startswith("torch.nn.modules.") and kind.__name__ in REPLACEMENTS


def _changed_values(before: nn.Module, now: nn.Module) -> dict[str, Any]:
    """Return the plain attributes of a module that differ from those before; tuples become lists, as in JSON."""
    values = vars(now)
    changed = {
        name: values[name]
        for name, value in vars(before).items()
        if _is_settable(name, value) and _is_value(values.get(name, now)) and not _equal(values[name], value)
    }
    return {name: list(value) if isinstance(value, tuple) else value for name, value in changed.items()}


def _equal(first: Any, second: Any) -> bool:
    return type(first) is type(second) and bool(first == second)


def _is_settable(name: str, value: Any) -> bool:
    is_open = not name.startswith("_") and name not in TRAINING_RATES | {"training"}
    return is_open and not FORBIDDEN_ARGUMENTS.fullmatch(name) and _is_value(value)


def _is_value(value: Any) -> bool:
    """Return whether a value is None, short text, a number of usual size, or a flat sequence of these."""
    parts = value if isinstance(value, list | tuple) else (value,)
    flat = not any(isinstance(part, list | tuple | dict) for part in parts)
    return flat and is_plain(value) and all(_TEXT.fullmatch(part) for part in parts if isinstance(part, str))


def _set(module: nn.Module, name: Any, value: Any, *, where: str) -> None:
    attributes = vars(module)
    known = isinstance(name, str) and name in attributes and _is_settable(name, attributes[name])
    require(known, f"{where}: the module of the base has no such attribute with a plain value")
    require(_is_value(value), f"{where}: {value!r:.99} is not None, short text, a number, or a list of these")
    attributes[name] = tuple(value) if isinstance(value, list) and not isinstance(attributes[name], list) else value
