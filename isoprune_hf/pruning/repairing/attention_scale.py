"""Restore the scale of attention scores after a cut of the dims inside rotated heads (`keep_scale`), and undo that."""

from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import torch

from isoprune_hf.checkpoint.modeling_isoprune import IsoPruneForImageClassification
from isoprune_hf.pruning.cutting.cut import apply_plan, keep_masks
from isoprune_hf.pruning.graph.copying import copy_modules, replace_tensor
from isoprune_hf.pruning.groups import CoupledGroup, Member
from isoprune_hf.pruning.plan import PruningPlan
from isoprune_hf.pruning.repairing.head_products import ProductKind, probe_images, read_logits
from isoprune_hf.pruning.repairing.rotation import Rotated


def keep_scale(
    rotated: Rotated,
    pruned: IsoPruneForImageClassification,
    plan: PruningPlan,
    groups: Sequence[CoupledGroup],
) -> dict[str, torch.Tensor]:
    """Scale queries by (n / d)^1/2, in place, if the model's attention scale depends on the number of dims.

    After a rotation the n kept dims carry the product of all d dims. Dividing it by the root of n instead of d, as
    such a model does after the cut, would sharpen the attention. The factors are applied only if cut and scaled heads
    compute what the base computes with the removed dims set to zero.

    Args:
        rotated: The model that was cut, and the products that were rotated.
        pruned: The cut model.
        plan: What was kept.
        groups: Groups of the base.

    Returns:
        Weight -> factor of each of its outputs in `pruned`; empty if the attention scale is fixed.
    """
    factors = _factors(rotated, plan, groups)
    if not factors:
        return {}
    names = [group.name for group in groups if group.num_heads and group.name in plan.kept]
    only_heads = PruningPlan({name: plan.kept[name] for name in names}, {name: plan.heads[name] for name in names})
    trial = apply_plan(rotated.model, only_heads, groups)
    _scale_outputs(trial, rotated, _factors(rotated, only_heads, groups))
    images = probe_images(rotated.model)
    masked = _zero_removed(rotated.model, keep_masks(only_heads, groups, rotated.model.model))
    wanted = read_logits(masked, images)
    if not torch.allclose(read_logits(trial, images), wanted, rtol=0, atol=1e-3 * float(wanted.abs().max())):
        return {}
    _scale_outputs(pruned, rotated, factors)
    return factors


def undo_scale(rotated: Rotated, pruned: IsoPruneForImageClassification, factors: Mapping[str, torch.Tensor]) -> None:
    """Divide queries by the factors of `keep_scale`, in place."""
    _scale_outputs(pruned, rotated, {name: 1 / factor for name, factor in factors.items()})


def _factors(rotated: Rotated, plan: PruningPlan, groups: Sequence[CoupledGroup]) -> dict[str, torch.Tensor]:
    """Return weight of queries -> (n / d)^1/2 for each kept row that is a query, and 1 for each other kept row."""
    masks = keep_masks(plan, groups, rotated.model.model)
    factors: dict[str, torch.Tensor] = {}
    for pair in rotated.pairs:
        name = pair.group.name
        if pair.kind is ProductKind.QUERIES_AND_KEYS and name in plan.kept:
            dims = len(plan.kept[name]) // len(plan.heads[name])
            for column in pair.left if dims < pair.group.head_dim else ():
                member = column.point.member
                factor = factors.setdefault(member.parameter, torch.ones(len(masks[member.parameter, member.dim])))
                factor[column.places] = (dims / pair.group.head_dim) ** 0.5
    dim_of = {member.parameter: member.dim for member in _left_members(rotated)}
    return {name: factor[masks[name, dim_of[name]]].to(rotated.model.device) for name, factor in factors.items()}


def _left_members(rotated: Rotated) -> Iterator[Member]:
    for pair in rotated.pairs:
        for column in pair.left:
            yield column.point.member


@torch.no_grad()
def _scale_outputs(
    model: IsoPruneForImageClassification, rotated: Rotated, factors: Mapping[str, torch.Tensor]
) -> None:
    """Multiply the rows of weights, and of their biases, by factors, in place."""
    columns = {column.point.member.parameter: column for pair in rotated.pairs for column in pair.left}
    for weight, factor in factors.items():
        for name, dim in columns[weight].parameters:
            parameter = model.model.get_parameter(name)
            parameter.mul_(factor.view([-1 if at == dim else 1 for at in range(parameter.ndim)]))


def _zero_removed(
    model: IsoPruneForImageClassification, masks: Mapping[tuple[str, int], np.ndarray]
) -> IsoPruneForImageClassification:
    """Copy a model and set the elements that masks remove to zero."""
    zeroed = copy_modules(model, lambda tensor: replace_tensor(tensor, tensor.detach().clone()))
    tensors = {**dict(zeroed.model.named_parameters()), **dict(zeroed.model.named_buffers())}
    with torch.no_grad():
        for (name, dim), mask in masks.items():
            tensors[name].index_fill_(dim, torch.from_numpy(np.flatnonzero(~mask)).to(model.device), 0)
    return zeroed
