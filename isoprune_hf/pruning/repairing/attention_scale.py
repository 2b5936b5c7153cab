"""The scale of attention scores after a cut of the dims inside rotated heads."""

from collections.abc import Mapping, Sequence

import numpy as np
import torch

from isoprune_hf.checkpoint.modeling_isoprune import IsoPruneForImageClassification
from isoprune_hf.pruning.cutting.cut import apply_plan, keep_masks
from isoprune_hf.pruning.graph.copying import copy_modules
from isoprune_hf.pruning.groups import CoupledGroup
from isoprune_hf.pruning.plan import PruningPlan
from isoprune_hf.pruning.repairing.head_products import probe_images, read_logits, replace_tensor
from isoprune_hf.pruning.repairing.rotation import Rotated


def keep_scale(
    rotated: Rotated,
    pruned: IsoPruneForImageClassification,
    plan: PruningPlan,
    groups: Sequence[CoupledGroup],
) -> dict[str, torch.Tensor]:
    """Make up, in place, for an attention scale that follows the number of dims: queries shrink by (n / d)^1/2.

    After a rotation the dims that stay hold the product of all; dividing it by the root of their number n, and no
    longer by that of the d dims before, would sharpen the attention. Done only where cut and scaled heads compute what
    the base does with the same dims set to zero.

    Returns:
        Weight -> factor of each of its outputs in `pruned`; empty where the scale is fixed.
    """
    names = [group.name for group in groups if group.num_heads and group.name in plan.kept]
    alone = PruningPlan({name: plan.kept[name] for name in names}, {name: plan.heads[name] for name in names})
    factors = _factors(rotated, plan, groups)
    if not factors:
        return {}
    trial = apply_plan(rotated.model, alone, groups)
    _scale_outputs(trial, rotated, _factors(rotated, alone, groups))
    images = probe_images(rotated.model)
    wanted = read_logits(_without(rotated.model, keep_masks(alone, groups, rotated.model.model)), images)
    if not torch.allclose(read_logits(trial, images), wanted, rtol=0, atol=1e-3 * float(wanted.abs().max())):
        return {}
    _scale_outputs(pruned, rotated, factors)
    return factors


def _factors(rotated: Rotated, plan: PruningPlan, groups: Sequence[CoupledGroup]) -> dict[str, torch.Tensor]:
    """Weight of queries -> (n / d)^1/2 for each of its rows that stay and are queries, 1 for the others."""
    masks = keep_masks(plan, groups, rotated.model.model)
    factors: dict[str, torch.Tensor] = {}
    for pair in rotated.pairs:
        name = pair.group.name
        if pair.kind == "queries and keys" and name in plan.kept:
            dims = len(plan.kept[name]) // len(plan.heads[name])
            for slot in pair.left if dims < pair.group.head_dim else ():
                key = slot.end.member.parameter, slot.end.member.dim
                factor = factors.setdefault(key[0], torch.ones(len(masks[key])))
                factor[slot.places] = (dims / pair.group.head_dim) ** 0.5
    cut = {slot.end.member.parameter: slot.end.member.dim for pair in rotated.pairs for slot in pair.left}
    return {name: factor[masks[name, cut[name]]].to(rotated.model.device) for name, factor in factors.items()}


@torch.no_grad()
def _scale_outputs(
    model: IsoPruneForImageClassification, rotated: Rotated, factors: Mapping[str, torch.Tensor]
) -> None:
    slots = {slot.end.member.parameter: slot for pair in rotated.pairs for slot in pair.left}
    for weight, factor in factors.items():
        for name, dim in slots[weight].parameters:
            parameter = model.model.get_parameter(name)
            parameter.mul_(factor.view([-1 if at == dim else 1 for at in range(parameter.ndim)]))


def _without(
    model: IsoPruneForImageClassification, masks: Mapping[tuple[str, int], np.ndarray]
) -> IsoPruneForImageClassification:
    """Copy a model with what leaves set to zero."""
    silent = copy_modules(model, lambda tensor: replace_tensor(tensor, tensor.detach().clone()))
    tensors = {**dict(silent.model.named_parameters()), **dict(silent.model.named_buffers())}
    with torch.no_grad():
        for (name, dim), mask in masks.items():
            tensors[name].index_fill_(dim, torch.from_numpy(np.flatnonzero(~mask)).to(model.device), 0)
    return silent
