"""Cut a model to a plan, first its tensors, then the numbers that modules keep about them: call `apply_plan`."""

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from isoprune_hf.checkpoint.difference import keep_cut_buffers, number_tables
from isoprune_hf.checkpoint.modeling_isoprune import IsoPruneForImageClassification
from isoprune_hf.checkpoint.structure import capture_structure, image_size_of, meta_copy
from isoprune_hf.errors import CheckpointError
from isoprune_hf.pruning.cost.macs import ModelCost
from isoprune_hf.pruning.cutting.attributes import set_attributes
from isoprune_hf.pruning.graph.blocks import replaceable_blocks
from isoprune_hf.pruning.graph.copying import copy_modules
from isoprune_hf.pruning.graph.find_groups import graph_of, trace_groups
from isoprune_hf.pruning.graph.train_mode import check_train_mode
from isoprune_hf.pruning.graph.verify import check_cut, sizes_after, total_macs, train_masks
from isoprune_hf.pruning.groups import CoupledGroup
from isoprune_hf.pruning.plan import PruningPlan


def apply_plan(
    model: IsoPruneForImageClassification,
    plan: PruningPlan,
    groups: Sequence[CoupledGroup] | None = None,
    *,
    base_cost: ModelCost | None = None,
) -> IsoPruneForImageClassification:
    """Cut a copy of the model to a plan.

    Args:
        model: The base; left untouched.
        plan: What to keep.
        groups: Groups of `trace_groups(model)`; traced if not given.
        base_cost: Cost of `model`; counted if not given.

    Returns:
        The pruned model in the mode of the base; its config has structure and cost.

    Raises:
        CheckpointError: The plan does not fit the model.
        UnsupportedArchitectureError: The forward pass of the cut model fails.
    """
    groups = trace_groups(model) if groups is None else groups
    graph = graph_of(model, groups)
    stand_ins = replaceable_blocks(model) if plan.removed_blocks else {}
    check_plan(plan, groups, stand_ins.keys() - set((model.config.structure or {}).get("removed") or ()))
    removed = tuple(f"{block}." for block in plan.removed_blocks)
    masks = keep_masks(plan, groups, model.model)
    masks |= train_masks(graph, masks)
    sizes = sizes_after(graph, masks, removed)
    pruned = _copy_cut(model, masks, plan.removed_blocks, stand_ins)
    set_attributes(graph, sizes, model.model, pruned.model, removed)
    overwritten = check_cut(graph, pruned.model, image_size_of(model), sizes, removed)
    _cut_overwritten(pruned.model, overwritten)
    check_train_mode(model.model, pruned.model, image_size_of(model), on_meta=graph.on_meta)
    _update_config(pruned, model)
    if base_cost is None:
        full = sum(parameter.numel() for parameter in model.parameters())
        base_cost = ModelCost(total_macs(graph, {}, ()), full)
    params = sum(parameter.numel() for parameter in pruned.parameters())
    cost = ModelCost(total_macs(graph, sizes, removed), params)
    dense_cost = pruned.config.cost["base"] if pruned.config.cost else base_cost.to_dict()
    pruned.config.cost = {"base": dense_cost, "pruned": cost.to_dict()}
    return pruned


def _cut_overwritten(network: nn.Module, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Cut the buffers that each pass overwrites to the shapes that they are given, in place."""
    for name, shape in shapes.items():
        path, _, leaf = name.rpartition(".")
        owner = network.get_submodule(path)
        buffer = owner.get_buffer(leaf)
        if len(shape) == buffer.ndim and all(size <= full for size, full in zip(shape, buffer.shape, strict=True)):
            setattr(owner, leaf, buffer[tuple(slice(size) for size in shape)].clone())


def _update_config(pruned: IsoPruneForImageClassification, model: IsoPruneForImageClassification) -> None:
    """Record structure, stage and layout in the config of a cut model, in place."""
    config, before = pruned.config, model.config.structure or {}
    is_own = config.base is None  # nothing builds its dense base again
    base = model.model if is_own or not any(before.values()) else meta_copy(model, dense=True).model
    config.structure = capture_structure(base, pruned.model)
    _drop_unchanged(config.structure["attributes"], before.get("attributes") or {}, model.model)
    if is_own and any(before.values()):
        config.structure = _joined(before, config.structure)
    keep_cut_buffers(pruned.model, config.structure)
    config.stage = "pruned"
    config.layout = "per-layer"


def _joined(before: dict[str, Any], cut: dict[str, Any]) -> dict[str, Any]:
    """Return the structure of a cut of a cut model, from that of the model and the one relative to it."""
    gone = tuple(f"{path}." for path in cut["removed"])
    shapes = {name: shape for name, shape in before["shapes"].items() if not name.startswith(gone)}
    attributes = {path: found for path, found in before["attributes"].items() if not f"{path}.".startswith(gone)}
    for path, found in cut["attributes"].items():
        attributes[path] = {**attributes.get(path, {}), **found}
    return {"shapes": {**shapes, **cut["shapes"]}, "attributes": attributes, "removed": cut["removed"]}


def _drop_unchanged(
    attributes: dict[str, dict[str, Any]], known: Mapping[str, Mapping[str, Any]], before: nn.Module
) -> None:
    """Drop, in place, attributes that the cut did not change: some modules (Swin) record sizes of the last image."""
    tables = number_tables(before)
    for path in list(attributes):
        for name, entry in list(attributes[path].items()):
            table, _, key = name.rpartition(".")
            old = tables.get((path, table), {}).get(key)
            value = tuple(entry) if isinstance(old, tuple) else entry
            if old == value and name not in known.get(path, {}):
                del attributes[path][name]
        if not attributes[path]:
            del attributes[path]


def check_plan(plan: PruningPlan, groups: Sequence[CoupledGroup], blocks: Collection[str] = ()) -> None:
    """Check that a plan fits the groups and the removable residual blocks of a model.

    Raises:
        CheckpointError: It does not; the message names the group or block.
    """
    known = {group.name: group for group in groups}
    for name in plan.removed_blocks:
        if name not in blocks or plan.removed_blocks.count(name) > 1:
            raise CheckpointError(f"pruning plan: {name!r} is not a removable residual block of this model")
    for name in plan.heads:
        if name not in plan.kept or not known.get(name, CoupledGroup("", "", 0, ())).num_heads:
            raise CheckpointError(f"pruning plan: heads names {name!r}, which is not an attention with kept channels")
    for name, kept in plan.kept.items():
        group = known.get(name)
        if group is None:
            raise CheckpointError(f"pruning plan: the model has no group {name!r}")
        if not kept or list(kept) != sorted(set(kept)) or kept[0] < 0 or kept[-1] >= group.channels:
            raise CheckpointError(
                f"pruning plan: {name} must keep ascending channels from 0 to {group.channels - 1}, at least one"
            )
        if group.num_heads:
            _check_heads(plan, group)


def _check_heads(plan: PruningPlan, group: CoupledGroup) -> None:
    """Check that a plan keeps the same number of dims in all heads of an attention, and the same dims where it must.

    Raises:
        CheckpointError: It does not.
    """
    kept = np.asarray(plan.kept[group.name])
    counts = np.bincount(kept // group.head_dim, minlength=group.num_heads)
    heads = tuple(np.flatnonzero(counts).tolist())
    if heads != tuple(plan.heads.get(group.name, ())) or len(set(counts[list(heads)].tolist())) != 1:
        raise CheckpointError(
            f"pruning plan: {group.name} must keep the same number of dims in each of its heads {list(heads)}"
        )
    dims_by_head = {tuple(sorted((kept[kept // group.head_dim == head] % group.head_dim).tolist())) for head in heads}
    if group.dim_members and len(dims_by_head) > 1:
        raise CheckpointError(f"pruning plan: {group.name} must keep the same dims in all of its heads")


def keep_masks(
    plan: PruningPlan, groups: Sequence[CoupledGroup], base: nn.Module
) -> dict[tuple[str, int], np.ndarray]:
    """Return (tensor, dim) -> boolean mask of the elements to keep, for the tensors that a plan cuts."""
    removed = tuple(f"{block}." for block in plan.removed_blocks)
    shapes = {name: tensor.shape for name, tensor in [*base.named_parameters(), *base.named_buffers()]}
    masks: dict[tuple[str, int], np.ndarray] = {}
    for group in groups:
        if group.name not in plan.kept:
            continue
        channels = np.delete(np.arange(group.channels), plan.kept[group.name])
        heads = np.delete(np.arange(group.num_heads), plan.heads.get(group.name, ()))
        for members, units in (
            (group.members, channels),
            (group.head_members, heads),
            (group.dim_members, _removed_dims(plan, group)),
        ):
            for member in members:
                if not removed or not member.parameter.startswith(removed):
                    key = member.parameter, member.dim
                    if key not in masks:
                        masks[key] = np.ones(shapes[member.parameter][member.dim], dtype=bool)
                    masks[key][member.index[units]] = False
    return masks


def _removed_dims(plan: PruningPlan, group: CoupledGroup) -> np.ndarray:
    """Return the dims that are removed from every head."""
    if not group.dim_members:
        return np.arange(0)
    return np.setdiff1d(np.arange(group.head_dim), np.unique(np.asarray(plan.kept[group.name]) % group.head_dim))


def _copy_cut(
    model: IsoPruneForImageClassification,
    masks: Mapping[tuple[str, int], np.ndarray],
    removed_blocks: Sequence[str],
    stand_ins: Mapping[str, nn.Module],
) -> IsoPruneForImageClassification:
    """Copy a model without the removed weights, which are never copied."""
    names = {id(tensor): name for name, tensor in [*model.model.named_parameters(), *model.model.named_buffers()]}
    kept: dict[str, dict[int, torch.Tensor]] = {}
    for (name, dim), mask in masks.items():
        kept.setdefault(name, {})[dim] = torch.from_numpy(np.flatnonzero(mask))

    @torch.no_grad()
    def cut(tensor: torch.Tensor) -> torch.Tensor:
        part, name = tensor.detach(), names.get(id(tensor), "")
        for dim, positions in sorted(kept.get(name, {}).items()):  # rows first: copying them is fast
            part = part.index_select(dim, positions.to(part.device))
        part = part if part.shape != tensor.shape else part.clone()
        return nn.Parameter(part, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else part

    replaced = {model.model.get_submodule(block): stand_ins[block] for block in removed_blocks}
    return copy_modules(model, cut, replaced=replaced)
