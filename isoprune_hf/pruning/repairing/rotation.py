"""Turning heads, before they are scored, into the basis in which few dims carry most; the model computes the same.

With L and R the second moments of both sides of a product over calibration images, and L^1/2 R^1/2 = U S V^T, the
matrix T = S^1/2 U^T L^-1/2 of `heads.py` gives both sides the moment S: the product falls into dims of falling weight,
and the first r of them are its best approximation of rank r in the metric of the activations (Eckart and Young, The
approximation of one matrix by another of lower rank, 1936).
"""

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator
from torch import nn

from isoprune_hf.checkpoint.modeling_isoprune import IsoPruneForImageClassification
from isoprune_hf.errors import RecipeError
from isoprune_hf.pruning.calibration.calibration import Batches
from isoprune_hf.pruning.calibration.gradients import scoring_mode, sum_over_ranks
from isoprune_hf.pruning.groups import CoupledGroup
from isoprune_hf.pruning.repairing.head_products import (
    KINDS,
    Pair,
    Slot,
    find_pairs,
    turn,
)

_FLOOR = 1e-6  # of the mean moment, added to each: directions that no image uses stay invertible
Sums = dict[tuple[int, str], torch.Tensor]


class Rotated(NamedTuple):
    """A model with turned heads, what was turned, and a line for each product that could not be."""

    model: IsoPruneForImageClassification
    pairs: tuple[Pair, ...]
    notes: tuple[str, ...]


def rotate_heads(
    model: IsoPruneForImageClassification,
    groups: Sequence[CoupledGroup],
    batches: Batches,
    accelerator: Accelerator | None = None,
) -> Rotated:
    """Turn the heads of every attention into the basis in which few dims carry most.

    Args:
        model: The base; left untouched.
        groups: Groups of `trace_groups`.
        batches: This rank's micro-batches: images (B, C, H, W), labels (B,).
        accelerator: Ranks that share the images; float64 moments are added over them once.

    Raises:
        RecipeError: There is no image, or an activation is not finite.
    """
    pairs = find_pairs(model, groups)
    turned = {(pair.group.name, pair.kind) for pair in pairs}
    notes = []
    for kind in KINDS:
        left = [group.name for group in groups if group.num_heads and (group.name, kind) not in turned]
        if left:
            notes.append(
                f"{kind} of {len(left)} attentions, {left[0]} the first, are not rotated: norms, positions or other "
                "operations lie between"
            )
    notes = tuple(notes)
    if not pairs:
        return Rotated(model, (), notes)
    moments = _moments(model, pairs, batches, accelerator)
    turns = [(pair, _basis(*moment)) for pair, moment in zip(pairs, moments, strict=True)]
    return Rotated(turn(model, turns), tuple(pairs), notes)


def _basis(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """T of the module from both second moments, (num_heads, head_dim, head_dim) each."""
    root, inverse = _roots(left)
    other, _ = _roots(right)
    u, s, _ = torch.linalg.svd(root @ other)
    return s.sqrt()[..., None] * (u.mT @ inverse)


def _roots(moment: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """M^1/2 and M^-1/2 of symmetric matrices."""
    values, vectors = torch.linalg.eigh(moment)
    floor = values.mean(-1, keepdim=True).clamp(min=torch.finfo(values.dtype).tiny) * _FLOOR
    roots = (values.clamp(min=0) + floor).sqrt()
    return (vectors * roots[..., None, :]) @ vectors.mT, (vectors / roots[..., None, :]) @ vectors.mT


def _moments(
    model: IsoPruneForImageClassification, pairs: Sequence[Pair], batches: Batches, accelerator: Accelerator | None
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Second moments of both sides: of queries and keys; of what the heads give, and of the weights that read it."""
    sums: Sums = {}
    handles = []
    for number, pair in enumerate(pairs):
        sides = {"left": pair.right} if pair.kind == "values" else {"left": pair.left, "right": pair.right}
        for side, slots in sides.items():
            sums[number, side] = _zeros(pair.group, model.device)
            for slot in slots:
                layer = model.model.get_submodule(slot.end.layer)
                register = layer.register_forward_hook if slot.end.is_output else layer.register_forward_pre_hook
                handles.append(register(partial(_watch, sums[number, side], slot, pair.group)))
    images = 0
    try:
        with scoring_mode(model, requires_grad=False), torch.no_grad():
            for pixel_values, labels in batches:
                model(pixel_values=pixel_values.to(model.device))
                images += len(labels)
    finally:
        for handle in handles:
            handle.remove()
    sums, count = sum_over_ranks((sums, torch.tensor(images, device=model.device)), accelerator)
    if not count:
        raise RecipeError("the calibration sample holds no image: prune.rotate needs at least one")
    for number, pair in enumerate(pairs):
        if pair.kind == "values":
            sums[number, "right"] = sum(_read_moment(model, slot, pair.group) for slot in pair.right)
    for (number, _), moment in sums.items():
        if not torch.isfinite(moment).all():
            raise RecipeError(f"the activations of {pairs[number].group.name} hold nan or inf: check the weights")
    return [(sums[number, "left"], sums[number, "right"]) for number in range(len(pairs))]


def _zeros(group: CoupledGroup, device: torch.device) -> torch.Tensor:
    return torch.zeros(group.num_heads, group.head_dim, group.head_dim, dtype=torch.float64, device=device)


def _watch(total: torch.Tensor, slot: Slot, group: CoupledGroup, layer: nn.Module, args: Any, *output: Any) -> None:
    """Add the moment of the channels in a layer's input or output."""
    x = output[0] if slot.end.is_output else args[0]
    channels = x.movedim(1, -1) if isinstance(layer, nn.Conv2d) else x
    part = channels[..., torch.from_numpy(slot.places).to(x.device)]
    part = part.reshape(-1, group.num_heads, group.head_dim).transpose(0, 1)
    total += torch.bmm(part.mT.double(), part.double())


def _read_moment(model: nn.Module, slot: Slot, group: CoupledGroup) -> torch.Tensor:
    member = slot.end.member
    weight = model.model.get_parameter(member.parameter).detach().double().movedim(member.dim, 0)
    rows = weight[torch.from_numpy(slot.places)].reshape(group.num_heads, group.head_dim, -1)
    return rows @ rows.mT
