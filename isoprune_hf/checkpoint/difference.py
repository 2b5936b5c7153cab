# Copyright 2026 the isoprune_hf authors. Licensed under the Apache License, Version 2.0.
"""What makes a pruned model out of its dense base: checked, and put on: a part of the file that ships."""

import math
import re
from collections.abc import Collection
from functools import partial
from typing import Any

import torch
from torch import nn

from isoprune_hf.checkpoint.dense import (
    BUILD_ERRORS,
    IsoPruneConfig,
    build_base,
    cause,
    require,
)
from isoprune_hf.errors import CheckpointError

# Steps of a forward pass that hand a tensor on: add to it, rectify it, lay it out anew.
_HANDS_ON = re.compile("(Add|Relu|View|UnsafeView|ReshapeAlias|Permute|Transpose|Clone|ToCopy|Alias)Backward0")


class SkippedBlock(nn.Module):
    """Stands where a removed residual block stood: hands on its first input, in the form of the block's output.

    Args:
        outputs: Length of the tuple that the block gives, whose other entries are None; 0 where it gives a tensor.
    """

    def __init__(self, outputs: int = 0):
        super().__init__()
        self.outputs = outputs

    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor | tuple:
        return (hidden_states, *[None] * (self.outputs - 1)) if self.outputs else hidden_states


def skippable_blocks(config: IsoPruneConfig) -> dict[str, SkippedBlock]:
    """Find the blocks of the dense base that may be left out, each with the module that then stands in its place.

    Such a block is an entry of a list of modules, has parameters, and gives its first input plus something: without
    it, what lies behind still gets what it expects. One forward pass on the meta device shows it.

    Returns:
        Path of the block -> its stand-in, in the order of the base; of blocks inside one another, the innermost.

    Raises:
        CheckpointError: The base cannot be built, or does not run on an image of `config.image_size`.
    """
    found: dict[str, SkippedBlock | None] = {}

    def note(path: str, _: nn.Module, args: tuple, output: Any) -> None:
        first, *others = output if isinstance(output, tuple) else (output,)
        given, *_ = args or (None,)
        holds = isinstance(given, torch.Tensor) and isinstance(first, torch.Tensor) and given.shape == first.shape
        holds = holds and all(other is None for other in others) and _hands_on(first.grad_fn, given.grad_fn)
        stand_in = SkippedBlock(len(others) + 1 if isinstance(output, tuple) else 0)
        found[path] = stand_in if holds and found.get(path, stand_in) else None  # each time that it is called

    with torch.inference_mode(False), torch.enable_grad(), torch.device("meta"):
        base = build_base(config).eval()
        for path, module in base.named_modules():
            listed = isinstance(base.get_submodule(path.rpartition(".")[0]), nn.ModuleList | nn.Sequential)
            if listed and path and next(module.parameters(), None) is not None:
                module.register_forward_hook(partial(note, path))
        run_once(base, config.image_size)
    blocks = {path: found[path] for path, _ in base.named_modules() if found.get(path) is not None}
    return {path: block for path, block in blocks.items() if not any(p.startswith(f"{path}.") for p in blocks)}


def run_once(model: nn.Module, image_size: list[int] | None) -> None:
    """Run a model of the meta device on one image, which allocates nothing.

    Raises:
        CheckpointError: It does not run.
    """
    try:
        model(torch.zeros(1, *(image_size or []), device="meta", requires_grad=True))
    except BUILD_ERRORS as error:
        if "cannot be called on meta tensors" in str(error):  # it reads values, which there are none of
            return
        raise CheckpointError(f"config.image_size: the model does not run on {image_size}: {cause(error)}") from error


def _hands_on(node: Any, source: Any) -> bool:
    """Whether a tensor, given by its node of the graph, is another one plus something."""
    pending, seen = [node], {None}
    while source is not None and pending:
        node = pending.pop()
        if node is source:
            return True
        if node not in seen and _HANDS_ON.fullmatch(node.name()):
            pending += [before for before, _ in node.next_functions]
        seen.add(node)
    return False


def check_structure(base: nn.Module, structure: dict[str, Any], skippable: Collection[str] = ()) -> None:
    """Check that `structure` can be put on `base`: nothing grows, nothing is invented, no type changes.

    Args:
        base: The dense architecture.
        structure: `shapes`, `attributes` and `removed`.
        skippable: The blocks that may be removed: see `skippable_blocks`.

    Raises:
        CheckpointError: Names the first entry that is wrong.
    """
    kinds = {"shapes": dict, "attributes": dict, "removed": list}
    known = isinstance(structure, dict) and not set(structure) - set(kinds)
    require(known, "config.structure: must hold only shapes, attributes and removed")
    holds = all(isinstance(structure.get(part), kind | None) for part, kind in kinds.items())
    require(holds, "config.structure: shapes and attributes are mappings, removed is a list")
    tensors, modules = named_tensors(base), dict(base.named_modules())
    for name, shape in (structure.get("shapes") or {}).items():
        where = f"config.structure.shapes[{name!r}]"
        require(name in tensors, f"{where}: the base has no such tensor")
        full = list(tensors[name].shape)
        fits = isinstance(shape, list) and len(shape) == len(full)
        fits = fits and all(type(n) is int and 1 <= n <= limit for n, limit in zip(shape, full, strict=True))
        require(fits, f"{where}: {shape!r:.99} is no shape within the base's {full}")
    for path, entries in (structure.get("attributes") or {}).items():
        where = f"config.structure.attributes[{path!r}]"
        require(path in modules and isinstance(entries, dict), f"{where}: the base has no such module")
        for name, value in entries.items():
            _check_attribute(f"{where}[{name!r}]", vars(modules[path]), name, value)
    open_to = set(skippable)
    for path in structure.get("removed") or []:
        holds = isinstance(path, str) and path in open_to
        require(holds, f"config.structure.removed: {path!r:.99} is no residual block of the base, or is named twice")
        open_to.remove(path)


def _check_attribute(where: str, owner: dict[str, Any], name: str, value: Any) -> None:
    require(not name.startswith("_") and name in owner, f"{where}: the base module has no such attribute")
    old = owner[name]
    value = tuple(value) if isinstance(value, list) and isinstance(old, tuple) else value
    numbers, olds = (value, old) if isinstance(old, tuple | list) else ((value,), (old,))
    same = type(value) is type(old) and len(numbers) == len(olds)
    require(same, f"{where}: {value!r:.99} is not of the base's type {type(old).__name__}")
    for number, limit in zip(numbers, olds, strict=True):
        same = type(number) is type(limit) and type(number) in (int, float)
        require(same, f"{where}: only numbers may differ from the base, got {value!r:.99}")
        fits = 0 < number <= limit if type(number) is int else 0 < number < math.inf
        require(fits, f"{where}: {value!r:.99} is not positive or above the base's {old!r}")


def apply_structure(
    model: nn.Module, structure: dict[str, Any] | None, skippable: dict[str, SkippedBlock] | None = None
) -> nn.Module:
    """Change `model` in place to the structure; tensors keep their leading elements. Works on the meta device too.

    Args:
        model: The dense architecture.
        structure: `shapes`, `attributes` and `removed`; None changes nothing.
        skippable: The blocks that may be removed, with their stand-ins: see `skippable_blocks`.

    Raises:
        CheckpointError: See `check_structure`.
    """
    structure, skippable = {} if structure is None else structure, skippable or {}
    check_structure(model, structure, skippable)
    tensors, made = named_tensors(model), {}
    for name, shape in (structure.get("shapes") or {}).items():
        path, _, leaf = name.rpartition(".")
        tensor = tensors[name]
        if id(tensor) not in made:  # what several names share stays shared
            kept = tensor.detach()[tuple(slice(size) for size in shape)].clone()
            made[id(tensor)] = nn.Parameter(kept, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else kept
        setattr(model.get_submodule(path), leaf, made[id(tensor)])
    keep_cut_buffers(model, structure)
    for path, entries in (structure.get("attributes") or {}).items():
        owner = model.get_submodule(path)
        for name, value in entries.items():
            setattr(owner, name, tuple(value) if isinstance(getattr(owner, name), tuple) else value)
    for path in structure.get("removed") or []:
        model.set_submodule(path, skippable[path])
    return model


def named_tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    """Give every parameter and buffer by each of its names, also the buffers that are not in the state dict."""
    named = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    return dict(named)


def keep_cut_buffers(model: nn.Module, structure: dict[str, Any] | None) -> None:
    """Put, in place, every buffer that was cut into the state dict, with the others of its module.

    What stayed of a table cannot be calculated anew, and a module calculates all of its tables or none.
    """
    for name in (structure or {}).get("shapes") or {}:
        path, _, leaf = name.rpartition(".")
        owner = model.get_submodule(path)
        if leaf in owner._non_persistent_buffers_set:
            owner._non_persistent_buffers_set.clear()


def build_pruned(config: IsoPruneConfig) -> nn.Module:
    """Build the architecture of `config` on the current default device: its base, changed by its structure.

    Raises:
        CheckpointError: The base cannot be built, or the structure does not fit it.
    """
    skippable = skippable_blocks(config) if (config.structure or {}).get("removed") else {}
    return apply_structure(build_base(config), config.structure, skippable)
