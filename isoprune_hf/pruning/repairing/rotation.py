"""Rotate attention heads, before they are scored, into the basis in which few dims carry most (`rotate_heads`).

The model computes the same. With L and R the second moments of both sides of a product over calibration images, and
L^1/2 R^1/2 = U S V^T, the matrix T = S^1/2 U^T L^-1/2 (see `head_products.py`) gives both sides the moment S: the
product becomes a sum over dims of decreasing weight, and the first r of them are its best approximation of rank r in
the metric of the activations.

Source:
    Eckart and Young, The approximation of one matrix by another of lower rank, 1936.
"""

from collections.abc import Mapping, Sequence
from functools import partial, reduce
from typing import Any, Literal, NamedTuple

import torch
from accelerate import Accelerator
from torch import nn
from torch.utils.hooks import RemovableHandle

from isoprune_hf.checkpoint.modeling_isoprune import IsoPruneForImageClassification
from isoprune_hf.pruning.calibration.calibration import Batches, finite_batches
from isoprune_hf.pruning.calibration.gradients import require_images, scoring_mode, sum_over_ranks
from isoprune_hf.pruning.calibration.inputs import read_tensor
from isoprune_hf.pruning.groups import CoupledGroup
from isoprune_hf.pruning.plan import note_left
from isoprune_hf.pruning.repairing.head_products import (
    BilinearPair,
    HeadColumn,
    ProductKind,
    find_pairs,
    probe_images,
    read_logits,
    transform_pairs,
)
from isoprune_hf.terminal import with_progress

_FLOOR_SHARE = 1e-6  # of the mean moment, added to each: directions that no image uses stay invertible
_NOT_FREE = "norms, positions or other operations lie between"
_NOT_FINITE = "their activations are not finite, or a head is singular"
_NOT_EXACT = "the rounding errors of their weights would be large"
_TOLERANCE = 1e-3  # of the largest logit, for the difference that rounding makes
_Side = Literal["left", "right"]
_Transform = tuple[BilinearPair, torch.Tensor]
_MomentSums = dict[tuple[int, _Side], torch.Tensor]  # number of the pair, side -> (num_heads, head_dim, head_dim)


class Rotated(NamedTuple):
    """A model with rotated heads.

    Args:
        model: The model.
        pairs: The products that were rotated.
        notes: Lines about products that could not be rotated.
    """

    model: IsoPruneForImageClassification
    pairs: tuple[BilinearPair, ...]
    notes: tuple[str, ...]


def rotate_heads(
    model: IsoPruneForImageClassification,
    groups: Sequence[CoupledGroup],
    batches: Batches,
    accelerator: Accelerator | None = None,
) -> Rotated:
    """Rotate the heads of every attention into the basis in which few dims carry most.

    Args:
        model: The base; left untouched.
        groups: Groups of `trace_groups`.
        batches: This rank's micro-batches: images (B, C, H, W), labels (B,).
        accelerator: Ranks that share the images; float64 moments are reduced over them once.

    Raises:
        RecipeError: There is no image.
    """
    attentions = [group.name for group in groups if group.num_heads]
    if not attentions:
        return Rotated(model, (), ("prune.rotate changes nothing: the model has no attention heads that can be cut",))
    pairs = find_pairs(model, groups)
    moments = _moments(model, pairs, batches, accelerator) if pairs else []
    bases = [(pair, _basis(*sides)) for pair, sides in zip(pairs, moments, strict=True)]
    finite = [(pair, basis) for pair, basis in bases if basis is not None]
    exact = _keep_exact(model, finite)
    left = {(name, kind): _NOT_FREE for kind in ProductKind for name in attentions}
    left |= {(pair.group.name, pair.kind): _NOT_FINITE for pair, basis in bases if basis is None}
    left |= {(pair.group.name, pair.kind): _NOT_EXACT for pair, _ in finite}
    for pair, _ in exact:
        del left[pair.group.name, pair.kind]
    rotated = transform_pairs(model, exact) if exact else model
    return Rotated(rotated, tuple(pair for pair, _ in exact), _notes(left))


def _keep_exact(model: IsoPruneForImageClassification, transforms: Sequence[_Transform]) -> Sequence[_Transform]:
    """Return the transforms after which a model computes the same, up to rounding."""
    if not transforms:
        return ()
    images = probe_images(model)
    before = read_logits(model, images)
    tolerance = _TOLERANCE * float(before.abs().max())

    def is_exact(chosen: Sequence[_Transform]) -> bool:
        return torch.allclose(read_logits(transform_pairs(model, chosen), images), before, rtol=0, atol=tolerance)

    return transforms if is_exact(transforms) else [one for one in transforms if is_exact([one])]


def _notes(left: Mapping[tuple[str, ProductKind], str]) -> tuple[str, ...]:
    """Return a note for each kind of product that is not rotated in every attention.

    Args:
        left: Name of the attention and kind of product -> reason.
    """
    notes: list[str] = []
    for kind in ProductKind:
        reasons: dict[str, list[str]] = {}
        for name, reason in ((name, reason) for (name, other), reason in left.items() if other is kind):
            reasons.setdefault(reason, []).append(name)
        notes += note_left(f"not rotated, {kind}", "attention", reasons)
    return tuple(notes)


def _basis(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor | None:
    """Compute T of the module from both second moments, (num_heads, head_dim, head_dim) each.

    Returns:
        None if T or its inverse is not finite.
    """
    if not (left.isfinite().all() and right.isfinite().all()):
        return None
    root, inverse = _roots(left)
    other, _ = _roots(right)
    u, s, _ = torch.linalg.svd(root @ other)
    basis: torch.Tensor = s.sqrt()[..., None] * (u.mT @ inverse)
    opposite, singular = torch.linalg.inv_ex(basis)
    is_usable = basis.isfinite().all() and opposite.isfinite().all() and not singular.any()
    return basis if is_usable else None


def _roots(moment: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute M^1/2 and M^-1/2 of symmetric matrices."""
    values, vectors = torch.linalg.eigh(moment)
    floor = values.mean(-1, keepdim=True).clamp(min=torch.finfo(values.dtype).tiny) * _FLOOR_SHARE
    roots = (values.clamp(min=0) + floor).sqrt()
    return (vectors * roots[..., None, :]) @ vectors.mT, (vectors / roots[..., None, :]) @ vectors.mT


def _moments(
    model: IsoPruneForImageClassification,
    pairs: Sequence[BilinearPair],
    batches: Batches,
    accelerator: Accelerator | None,
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Compute the second moments of both sides of each pair.

    For queries and keys, both are moments of activations. For values, the left moment is that of the heads' outputs,
    and the right one that of the weights that read them.

    Raises:
        RecipeError: There is no image.
    """
    sums, images = _sum_activations(model, pairs, batches, 0 if accelerator is None else accelerator.process_index)
    sums, images = sum_over_ranks((sums, images), accelerator)
    require_images(images, "prune.rotate")
    for number, pair in enumerate(pairs):
        if pair.kind is ProductKind.VALUES:
            parts = (_weight_moment(model, column, pair.group) for column in pair.right)
            sums[number, "right"] = reduce(torch.add, parts)
    return [(sums[number, "left"], sums[number, "right"]) for number in range(len(pairs))]


def _sum_activations(
    model: IsoPruneForImageClassification, pairs: Sequence[BilinearPair], batches: Batches, rank: int
) -> tuple[_MomentSums, torch.Tensor]:
    """Sum the moments of the activations over this rank's images; return them with the number of images."""
    sums: _MomentSums = {}
    handles: list[RemovableHandle] = []
    for number, pair in enumerate(pairs):
        # The heads' outputs are read by the layer on the right side of the values.
        sides: dict[_Side, tuple[HeadColumn, ...]] = {"left": pair.left, "right": pair.right}
        if pair.kind is ProductKind.VALUES:
            sides = {"left": pair.right}
        for side, columns in sides.items():
            shape = (pair.group.num_heads, pair.group.head_dim, pair.group.head_dim)
            sums[number, side] = torch.zeros(shape, dtype=torch.float64, device=model.device)
            for column in columns:
                layer = model.model.get_submodule(column.point.layer)
                hook = partial(_add_moment, sums[number, side], column, pair.group)
                if column.point.is_output:
                    handles.append(layer.register_forward_hook(hook, with_kwargs=True))
                else:
                    handles.append(layer.register_forward_pre_hook(hook, with_kwargs=True))
    images = 0
    try:
        with scoring_mode(model, requires_grad=False), torch.no_grad():
            for pixel_values, labels in finite_batches(with_progress(batches, "rotate", "batch", rank=rank)):
                model(pixel_values=pixel_values.to(model.device))
                images += len(labels)
    finally:
        for handle in handles:
            handle.remove()
    return sums, torch.tensor(images, device=model.device)


def _add_moment(
    total: torch.Tensor,
    column: HeadColumn,
    group: CoupledGroup,
    layer: nn.Module,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    *output: torch.Tensor,
) -> None:
    """Add the moment of the channels in a layer's input (pre-hook) or output (hook) to `total`, in place."""
    x = output[0] if column.point.is_output else read_tensor(args, kwargs)
    channels = x.movedim(1, -1) if isinstance(layer, nn.Conv2d) else x
    part = channels[..., torch.from_numpy(column.places).to(x.device)]
    part = part.reshape(-1, group.num_heads, group.head_dim).transpose(0, 1)
    total += torch.bmm(part.mT.double(), part.double())


def _weight_moment(model: IsoPruneForImageClassification, column: HeadColumn, group: CoupledGroup) -> torch.Tensor:
    member = column.point.member
    weight = model.model.get_parameter(member.parameter).detach().double().movedim(member.dim, 0)
    rows = weight[torch.from_numpy(column.places)].reshape(group.num_heads, group.head_dim, -1)
    moment: torch.Tensor = rows @ rows.mT
    return moment
