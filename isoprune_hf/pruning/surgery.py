"""The cut: carry a plan out on a model, first on its tensors, then on the numbers that modules keep about them."""

from collections.abc import Collection, Mapping, Sequence

import numpy as np
import torch
from torch import nn

from isoprune_hf.checkpoint.modeling_isoprune import IsoPruneForImageClassification, skippable_blocks
from isoprune_hf.checkpoint.structure import capture_structure, meta_copy
from isoprune_hf.errors import CheckpointError
from isoprune_hf.pruning.architectures import (
    HEAD_DIMS,
    HEAD_SCALES,
    KEY_HEAD_COUNTS,
    KEY_WIDTHS,
    QUERY_HEAD_COUNTS,
    QUERY_WIDTHS,
    Attention,
    find_attention,
    find_patch_merging,
)
from isoprune_hf.pruning.copying import copy_modules
from isoprune_hf.pruning.cost import ModelCost, count_cost
from isoprune_hf.pruning.graph import trace_groups
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
        plan: What stays.
        groups: Groups of `trace_groups(model)`; traced anew when not given.
        base_cost: Cost of `model`; counted when not given.

    Returns:
        The pruned model, its config holding structure and cost, in the base's mode.

    Raises:
        CheckpointError: The plan does not fit the model.
        UnsupportedArchitectureError: The cut model does not run.
    """
    groups = trace_groups(model) if groups is None else groups
    stand_ins = skippable_blocks(model.config) if plan.removed_blocks else {}
    check_plan(plan, groups, stand_ins.keys() - set((model.config.structure or {}).get("removed") or ()))
    pruned = _copy_cut(model, _kept_elements(plan, groups, model.model), plan.removed_blocks, stand_ins)
    attentions = {part.path: part for part in find_attention(model.model)}
    for module in pruned.model.modules():
        _set_layer_numbers(module)
    for group in groups:
        if group.num_heads and group.name in plan.kept:
            heads = len(plan.heads[group.name])
            _set_attention_numbers(pruned.model, attentions[group.name], heads, len(plan.kept[group.name]) // heads)
    _set_widths(model.model, pruned.model, plan.removed_blocks)
    config = pruned.config
    is_dense = not any((model.config.structure or {}).values())
    base = model.model if is_dense else meta_copy(model, dense=True).model
    config.structure = capture_structure(base, pruned.model)
    _forget_state(config.structure["attributes"], (model.config.structure or {}).get("attributes") or {}, model.model)
    config.stage = "pruned"
    base_cost = base_cost.to_dict() if base_cost else count_cost(model).to_dict()
    base_cost = config.cost["base"] if config.cost else base_cost
    config.cost = {"base": base_cost, "pruned": count_cost(pruned).to_dict()}
    return pruned


def _forget_state(
    attributes: dict[str, dict[str, object]], known: Mapping[str, Mapping[str, object]], before: nn.Module
) -> None:
    """Drop, in place, what was not changed by the cut: some modules (Swin) note sizes of the last image they saw."""
    for path in list(attributes):
        owner = vars(before.get_submodule(path))
        for name, value in list(attributes[path].items()):
            value = tuple(value) if isinstance(value, list) else value
            if owner.get(name) == value and name not in known.get(path, {}):
                del attributes[path][name]
        if not attributes[path]:
            del attributes[path]


def check_plan(plan: PruningPlan, groups: Sequence[CoupledGroup], blocks: Collection[str] = ()) -> None:
    """Check that a plan fits the groups and the residual blocks of a model.

    Raises:
        CheckpointError: Names the group or block that does not fit.
    """
    known = {group.name: group for group in groups}
    for name in plan.removed_blocks:
        if name not in blocks or plan.removed_blocks.count(name) > 1:
            raise CheckpointError(f"pruning plan: {name!r} is no residual block of this model that can leave")
    for name in plan.heads:
        if name not in plan.kept or not known.get(name, CoupledGroup("", "", 0, ())).num_heads:
            raise CheckpointError(f"pruning plan: heads of {name!r}, which keeps no channels of an attention")
    for name, kept in plan.kept.items():
        group = known.get(name)
        if group is None:
            raise CheckpointError(f"pruning plan: the model has no group {name!r}")
        if not kept or list(kept) != sorted(set(kept)) or kept[0] < 0 or kept[-1] >= group.channels:
            raise CheckpointError(
                f"pruning plan: {name} must keep ascending channels from 0 to {group.channels - 1}, at least one"
            )
        if group.num_heads:
            counts = np.bincount(np.asarray(kept) // group.head_dim, minlength=group.num_heads)
            heads = tuple(np.flatnonzero(counts).tolist())
            if heads != tuple(plan.heads.get(name, ())) or len(set(counts[list(heads)].tolist())) != 1:
                raise CheckpointError(
                    f"pruning plan: {name} must keep the same number of dims in each of its heads {list(heads)}"
                )


def _kept_elements(
    plan: PruningPlan, groups: Sequence[CoupledGroup], base: nn.Module
) -> dict[str, dict[int, torch.Tensor]]:
    """Tensor -> dim -> positions that stay."""
    shapes = {name: tensor.shape for name, tensor in [*base.named_parameters(), *base.named_buffers()]}
    masks: dict[tuple[str, int], np.ndarray] = {}
    gone = tuple(f"{block}." for block in plan.removed_blocks)
    for group in groups:
        if group.name not in plan.kept:
            continue
        leaving = np.delete(np.arange(group.channels), plan.kept[group.name])
        leaving_heads = np.delete(np.arange(group.num_heads), plan.heads.get(group.name, ()))
        for members, units in ((group.members, leaving), (group.head_members, leaving_heads)):
            for member in members:
                if not member.parameter.startswith(gone):
                    key = member.parameter, member.dim
                    if key not in masks:
                        masks[key] = np.ones(shapes[member.parameter][member.dim], dtype=bool)
                    masks[key][member.index[units]] = False
    kept: dict[str, dict[int, torch.Tensor]] = {}
    for (parameter, dim), mask in masks.items():
        kept.setdefault(parameter, {})[dim] = torch.from_numpy(np.flatnonzero(mask))
    return kept


def _copy_cut(
    model: IsoPruneForImageClassification,
    kept: Mapping[str, Mapping[int, torch.Tensor]],
    removed_blocks: Sequence[str],
    stand_ins: Mapping[str, nn.Module],
) -> IsoPruneForImageClassification:
    """Copy a model with what leaves left out; weights that leave are never copied."""
    names = {id(tensor): name for name, tensor in [*model.model.named_parameters(), *model.model.named_buffers()]}

    @torch.no_grad()
    def cut(tensor: torch.Tensor) -> torch.Tensor:
        part = tensor.detach()
        for dim, positions in kept.get(names.get(id(tensor), ""), {}).items():
            part = part.index_select(dim, positions.to(part.device))
        part = part if part.shape != tensor.shape else part.clone()
        return nn.Parameter(part, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else part

    replaced = {model.model.get_submodule(block): stand_ins[block] for block in removed_blocks}
    return copy_modules(model, cut, replaced=replaced)


def _set_layer_numbers(module: nn.Module) -> None:
    """Let a layer's numbers agree with its tensors."""
    if isinstance(module, nn.Linear):
        module.out_features, module.in_features = module.weight.shape
    elif isinstance(module, nn.modules.conv._ConvNd) and not module.transposed:
        depthwise = 1 < module.groups == module.in_channels == module.out_channels
        module.out_channels = module.weight.shape[0]
        module.groups = module.out_channels if depthwise else module.groups
        module.in_channels = module.weight.shape[1] * module.groups
    elif isinstance(module, nn.modules.batchnorm._BatchNorm) and module.weight is not None:
        module.num_features = module.weight.shape[0]
    elif isinstance(module, nn.LayerNorm) and module.weight is not None:
        module.normalized_shape = tuple(module.weight.shape)
    elif isinstance(module, nn.GroupNorm) and module.weight is not None:
        module.num_channels = module.weight.shape[0]


def _set_attention_numbers(model: nn.Module, part: Attention, heads: int, head_dim: int) -> None:
    # The scale follows the new head dim: fused attention takes it from the tensors, eager attention from the module.
    values = [
        (QUERY_HEAD_COUNTS, heads * part.queries_per_head),
        (KEY_HEAD_COUNTS, heads),
        (HEAD_DIMS, head_dim),
        (QUERY_WIDTHS, heads * part.queries_per_head * head_dim),
        (KEY_WIDTHS, heads * head_dim),
        (HEAD_SCALES, head_dim**-0.5),
    ]
    module = model.get_submodule(part.path)
    for names, value in values:
        for name in names:
            if name in vars(module):
                setattr(module, name, value)


def _set_widths(base: nn.Module, pruned: nn.Module, removed_blocks: Sequence[str]) -> None:
    """Widths that are kept for information, beside the layer that they speak of."""
    for part in find_patch_merging(base):
        merging, reduction = pruned.get_submodule(part.path), pruned.get_submodule(part.reduction)
        for name, value in (("dim", reduction.in_features // 4), ("out_dim", reduction.out_features)):
            if name in vars(merging):
                setattr(merging, name, value)
    gone = tuple(f"{block}." for block in removed_blocks)
    for part in find_attention(base):
        if part.path.startswith(gone):
            continue
        module = pruned.get_submodule(part.path)
        if "dim" in vars(module):
            module.dim = pruned.get_submodule(part.projections[0]).in_features
    heads = [name for name, module in base.named_modules() if isinstance(module, nn.Linear)]
    if not heads:  # the classifier is a convolution
        return
    old, new = base.get_submodule(heads[-1]).in_features, pruned.get_submodule(heads[-1]).in_features
    for owner in (pruned, getattr(pruned, "head", None)):
        for name in ("num_features", "head_hidden_size", "embed_dim", "in_features", "hidden_size"):
            if owner is not None and vars(owner).get(name) == old:
                setattr(owner, name, new)
