# Copyright 2026 the isoprune_hf authors. Licensed under the Apache License, Version 2.0.
"""Check and apply the differences between a pruned model and its dense base (part of the shipped file).

`build_pruned` builds the architecture of a config; `apply_structure` changes a base in place; `skippable_blocks` finds
the residual blocks that may be removed; `number_tables` lists where a module keeps numbers.
"""

import math
import re
from argparse import Namespace
from collections.abc import Collection, Mapping
from dataclasses import is_dataclass
from functools import cache, partial
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig

from isoprune_hf.checkpoint.dense import (
    LIBRARY_ERRORS,
    IsoPruneConfig,
    build_base,
    describe_error,
)
from isoprune_hf.checkpoint.meta import move_to_meta
from isoprune_hf.checkpoint.own_network import Inputs, call_on, inputs_of
from isoprune_hf.checkpoint.plain_values import require
from isoprune_hf.checkpoint.transfer import fit_classes
from isoprune_hf.errors import CheckpointError

# Autograd nodes of operations that add to a tensor, rectify it or change its layout: a shortcut runs through these.
_SHORTCUT_NODES = re.compile("(Add|Relu|View|UnsafeView|ReshapeAlias|Permute|Transpose|Clone|ToCopy|Alias)Backward0")
_READS_VALUES = ("meta tensor", "meta device", "data-independent")  # in errors of operations on the meta device


class SkippedBlock(nn.Module):
    """Replacement for a removed residual block: returns its first input in the form of the block's output.

    Args:
        outputs: Length of the tuple that the block returns, whose other entries are None; 0 if it returns a tensor.
    """

    def __init__(self, outputs: int = 0):
        super().__init__()
        self.outputs = outputs

    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor | tuple[Any, ...]:
        return (hidden_states, *[None] * (self.outputs - 1)) if self.outputs else hidden_states


def skippable_blocks(config: IsoPruneConfig) -> dict[str, SkippedBlock]:
    """Find the blocks of the dense base that may be removed, each with its replacement.

    A block qualifies if it is an entry of a list of modules, has parameters, and returns its first input plus a term,
    so that the modules after it still receive a tensor. One forward pass on the meta device decides.

    Returns:
        Path of each block -> its replacement, in the order of the base; of nested blocks, only the innermost.

    Raises:
        CheckpointError: The base cannot be built, or does not run on its inputs.
    """
    with torch.inference_mode(False), torch.device("meta"):
        base = move_to_meta(build_base(config)).eval()
    return skippable_parts(base, inputs_of(config.base, config.image_size))


def skippable_parts(base: nn.Module, inputs: Inputs) -> dict[str, SkippedBlock]:
    """Find the blocks of a network that may be removed; it lies on the meta device, in eval mode, and is changed.

    Raises:
        CheckpointError: It does not run on such inputs.
    """
    found: dict[str, SkippedBlock | None] = {}

    def note(path: str, _: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        first, *others = output if isinstance(output, tuple) else (output,)
        given = args[0] if args else None
        is_residual = (
            isinstance(given, torch.Tensor)
            and isinstance(first, torch.Tensor)
            and given.shape == first.shape
            and all(other is None for other in others)
            and _is_shortcut(given.grad_fn, first.grad_fn)
        )
        replacement = SkippedBlock(len(others) + 1 if isinstance(output, tuple) else 0)
        # A block that is called several times must qualify each time.
        found[path] = replacement if is_residual and found.get(path, replacement) is not None else None

    with torch.inference_mode(False), torch.enable_grad(), torch.device("meta"):
        for path, module in base.named_modules():
            is_entry = isinstance(base.get_submodule(path.rpartition(".")[0]), nn.ModuleList | nn.Sequential)
            if is_entry and path and next(module.parameters(), None) is not None:
                module.register_forward_hook(partial(note, path))
        run_once(base, inputs)
    blocks = {path: block for path, _ in base.named_modules() if (block := found.get(path)) is not None}
    return {path: block for path, block in blocks.items() if not any(p.startswith(f"{path}.") for p in blocks)}


def run_once(model: nn.Module, inputs: Inputs) -> None:
    """Run a model on the meta device on one sample of its inputs, without allocating memory.

    Raises:
        CheckpointError: The model does not run on such inputs.
    """
    try:
        call_on(model, inputs, lambda shape: torch.zeros(1, *shape, device="meta", requires_grad=True))
    except LIBRARY_ERRORS as error:
        # The model reads values, and tensors on meta have none. torch has no type of its own for these errors.
        if any(part in str(error).lower() for part in _READS_VALUES):
            return
        raise CheckpointError(
            f"config.image_size: the model does not run on {', '.join(str(shape) for _, shape in inputs)}: "
            f"{describe_error(error)}"
        ) from error


def _is_shortcut(source: Any, node: Any) -> bool:
    """Return whether a path of `_SHORTCUT_NODES` leads from the tensor of `source` to that of `node`."""
    pending = [node]
    seen = {None}
    while source is not None and pending:
        node = pending.pop()
        if node is source:
            return True
        if node not in seen and _SHORTCUT_NODES.fullmatch(node.name()):
            pending += [before for before, _ in node.next_functions]
        seen.add(node)
    return False


def check_structure(base: nn.Module, structure: dict[str, Any], skippable: Collection[str] = ()) -> None:
    """Check that `structure` fits `base`: no tensor or size grows, every name exists, no type changes.

    Args:
        base: The dense architecture.
        structure: `shapes`, `attributes` and `removed`.
        skippable: Paths of the blocks that may be removed, see `skippable_blocks`.

    Raises:
        CheckpointError: An entry does not fit; the message names the first one.
    """
    kinds: dict[str, type] = {"shapes": dict, "attributes": dict, "removed": list}
    known = isinstance(structure, dict) and not set(structure) - set(kinds)
    require(known, "config.structure: only the entries shapes, attributes and removed are allowed")
    holds = all(isinstance(structure.get(part), kind | None) for part, kind in kinds.items())
    require(holds, "config.structure: shapes and attributes must be mappings, removed must be a list")
    tensors = named_tensors(base)
    for name, shape in (structure.get("shapes") or {}).items():
        where = f"config.structure.shapes[{name!r}]"
        require(name in tensors, f"{where}: the base has no such tensor")
        _check_shape(where, shape, list(tensors[name].shape))
    modules = dict(base.named_modules())
    for path, entries in (structure.get("attributes") or {}).items():
        where = f"config.structure.attributes[{path!r}]"
        require(path in modules and isinstance(entries, dict), f"{where}: the base has no such module")
        for name, value in entries.items():
            table, _, key = str(name).rpartition(".")
            _check_attribute(f"{where}[{name!r}]", _tables_of(modules[path]).get(table, {}), key, value)
    remaining = set(skippable)
    for path in structure.get("removed") or []:
        require(
            isinstance(path, str) and path in remaining,
            f"config.structure.removed: {path!r:.99} is not a residual block of the base, or is listed twice",
        )
        remaining.remove(path)


def _check_shape(where: str, shape: Any, full: list[int]) -> None:
    fits = isinstance(shape, list) and len(shape) == len(full)
    fits = fits and all(type(size) is int and 1 <= size <= limit for size, limit in zip(shape, full, strict=True))
    require(fits, f"{where}: {shape!r:.99} is not a shape within the shape {full} of the base")


def _check_attribute(where: str, owner: Mapping[str, Any], name: str, value: Any) -> None:
    require(not name.startswith("_") and name in owner, f"{where}: the module of the base has no such attribute")
    old = owner[name]
    value = tuple(value) if isinstance(value, list) and isinstance(old, tuple) else value
    numbers, olds = (value, old) if isinstance(old, tuple | list) else ((value,), (old,))
    same = type(value) is type(old) and len(numbers) == len(olds)
    require(same, f"{where}: {value!r:.99} does not have the type {type(old).__name__} and the length of the base")
    for number, limit in zip(numbers, olds, strict=True):
        same = type(number) is type(limit) and type(number) in (int, float)
        require(same, f"{where}: only numbers may differ from the base, got {value!r:.99}")
        fits = 0 < number <= limit if type(number) is int else 0 < number < math.inf
        require(fits, f"{where}: {value!r:.99} is not positive, or is larger than {old!r} in the base")


def apply_structure(
    model: nn.Module, structure: dict[str, Any] | None, skippable: dict[str, SkippedBlock] | None = None
) -> nn.Module:
    """Change `model` in place to `structure`, and return it. Works on the meta device too.

    A tensor that gets smaller keeps its leading elements.

    Args:
        model: The dense architecture.
        structure: `shapes`, `attributes` and `removed`; None changes nothing.
        skippable: The blocks that may be removed with their replacements, see `skippable_blocks`.

    Raises:
        CheckpointError: See `check_structure`.
    """
    structure = {} if structure is None else structure
    skippable = skippable or {}
    check_structure(model, structure, skippable)
    tensors = named_tensors(model)
    cut: dict[int, torch.Tensor] = {}
    for name, shape in (structure.get("shapes") or {}).items():
        path, _, leaf = name.rpartition(".")
        tensor = tensors[name]
        if id(tensor) not in cut:  # a tensor with several names stays shared
            kept = tensor.detach()[tuple(slice(size) for size in shape)].clone()
            is_parameter = isinstance(tensor, nn.Parameter)
            cut[id(tensor)] = nn.Parameter(kept, tensor.requires_grad) if is_parameter else kept
        setattr(model.get_submodule(path), leaf, cut[id(tensor)])
    keep_cut_buffers(model, structure)
    for path, entries in (structure.get("attributes") or {}).items():
        owner = model.get_submodule(path)
        for name, value in entries.items():
            table, _, key = name.rpartition(".")
            numbers = _tables_of(owner)[table]
            numbers[key] = tuple(value) if isinstance(numbers[key], tuple) else value
    for path in structure.get("removed") or []:
        model.set_submodule(path, skippable[path])
    return model


def number_tables(network: nn.Module, skipped: Collection[str] = ()) -> dict[tuple[str, str], dict[str, Any]]:
    """Return the tables in which the modules of a network keep numbers: their attributes and their configs.

    Args:
        network: The network.
        skipped: Paths of modules to leave out.

    Returns:
        (path of a module, "") -> its attributes, and (path, attribute) -> the entries of a config. A config that
        several modules share is listed for the first of them.
    """
    found: dict[tuple[str, str], dict[str, Any]] = {}
    seen: set[int] = set()
    for path, module in network.named_modules():
        for name, table in () if path in skipped else _tables_of(module).items():
            if id(table) not in seen:
                seen.add(id(table))
                found[path, name] = table
    return found


def _tables_of(module: nn.Module) -> dict[str, dict[str, Any]]:
    """Return the attributes of a module under "", and the entries of its configs: attributes made to hold values."""
    attributes = vars(module)
    tables = {"": attributes}
    for name, value in attributes.items():
        # mypy takes the hash of a type for that of its instances.
        if _holds_values(type(value)) and not name.startswith("_"):  # type: ignore[arg-type]
            tables[name] = value if isinstance(value, dict) else vars(value)
    return tables


@cache
def _holds_values(kind: type) -> bool:
    """Check whether a type is made to hold values by name."""
    return kind is dict or issubclass(kind, PreTrainedConfig | SimpleNamespace | Namespace) or is_dataclass(kind)


def named_tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    """Return every parameter and buffer under each of its names, including buffers outside the state dict."""
    named = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    return dict(named)


def keep_cut_buffers(model: nn.Module, structure: dict[str, Any] | None) -> None:
    """Add every cut buffer to the state dict, in place, together with the other buffers of its module.

    The kept entries of an index table cannot be recomputed, and a module recomputes either all of its tables or none.
    """
    for name in (structure or {}).get("shapes") or {}:
        path, _, leaf = name.rpartition(".")
        owner = model.get_submodule(path)
        if leaf in owner._non_persistent_buffers_set:
            owner._non_persistent_buffers_set.clear()


def build_pruned(config: IsoPruneConfig) -> nn.Module:
    """Build the architecture of `config`, without trained weights, on the current default device.

    The shapes of the head in `config.structure` get the number of classes of `config`, see `fit_classes`.

    Raises:
        CheckpointError: The base cannot be built, or the structure does not fit it.
    """
    base = build_base(config)
    config.structure = fit_classes(config, base)
    skippable = skippable_blocks(config) if (config.structure or {}).get("removed") else {}
    return apply_structure(base, config.structure, skippable)
