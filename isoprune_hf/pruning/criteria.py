"""What a channel is worth: one function for each criterion, and how values of elements become those of channels.

A criterion gives every element of every parameter a value, or every channel of a group a score of its own. It knows
neither who competes with whom nor how much leaves; scores of different groups are made comparable elsewhere
(`ranking.py`). To add one: write a function here, name it in `CRITERIA` and in `recipes.Criterion`.

How values v become the score of channel c of a group with members m (weights, biases, norms, tokens), where m(c) are
the elements of m at the positions m.index[c] on its dim:

    sum      s_m(c) = sum of |v| over m(c)            score(c) = R over m of s_m(c)
    member   s_m(c) = (sum of v^2 over m(c))^(1/2)    score(c) = R over m of s_m(c)
    channel  s_m(c) = sum of v^2 over m(c)            score(c) = (R over m of s_m(c))^(1/2)

R is the sum, or the mean over the members that hold values: buffers do not, nor does BatchNorm where it is left out.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import torch
from accelerate import Accelerator
from torch import nn

from isoprune_hf.errors import RecipeError
from isoprune_hf.pruning.activations import find_readers, input_variances
from isoprune_hf.pruning.gradients import Batches, Precision, mean_gradients
from isoprune_hf.pruning.groups import CoupledGroup, ResidualBlock
from isoprune_hf.pruning.hessian import last_squared_gradient, mean_squared_gradients
from isoprune_hf.pruning.reference import counted_weights

_CHUNK = 2**17  # elements that are summed at once
Reduction = Literal["sum", "mean"]
Norm = Literal["sum", "member", "channel"]
Values = Mapping[str, torch.Tensor]
Sums = Mapping[str, Mapping[int, torch.Tensor]]
Scores = tuple[dict[str, torch.Tensor], dict[str, float]]  # of groups, (channels,) float64, and of blocks


@dataclass(frozen=True, eq=False)
class Scoring:
    """What a criterion works on.

    Args:
        criterion: Its name.
        model: The base.
        groups: Groups to score.
        blocks: Residual blocks to score.
        weights: Parameters that count, in float32.
        batchnorm: Names among them that belong to BatchNorm.
        batches: This rank's micro-batches, for criteria that read images.
        accelerator: Ranks that share the images.
        seed: Of the random criterion.
        reduction: How the members of a channel are put together.
        precision: Of the passes over images.
    """

    criterion: str
    model: nn.Module
    groups: Sequence[CoupledGroup]
    blocks: Sequence[ResidualBlock]
    weights: Values
    batchnorm: frozenset[str]
    batches: Batches
    accelerator: Accelerator | None
    seed: int
    reduction: Reduction
    precision: Precision


def _taylor(scoring: Scoring) -> Scores:
    """v = w dL/dw, summed. Molchanov et al., Importance Estimation for Neural Network Pruning, CVPR 2019."""
    return _from_elements(scoring, _first_order(scoring), "sum")


def _taylor_l2(scoring: Scoring) -> Scores:
    """v = w dL/dw, the L2 norm of each slice. Fang et al., Isomorphic Pruning, ECCV 2024."""
    return _from_elements(scoring, _first_order(scoring), "member")


def _taylor_reference(scoring: Scoring) -> Scores:
    """The same over what torch-pruning counts: for parity only (see `counted_weights`)."""
    return _taylor(replace(scoring, weights=counted_weights(scoring.model.model, scoring.weights)))


def _hessian(scoring: Scoring) -> Scores:
    """v = w^2 E[g_n^2], summed. Le Cun et al., Optimal Brain Damage, NeurIPS 1989, without its factor 1/2."""
    return _from_elements(scoring, _second_order(scoring, mean_squared_gradients), "sum")


def _hessian_reference(scoring: Scoring) -> Scores:
    """v = w^2 g^2 of the last image alone: a defect, for parity only (see `last_squared_gradient`)."""
    return _from_elements(scoring, _second_order(scoring, last_squared_gradient), "sum")


def _l1(scoring: Scoring) -> Scores:
    """v = w, summed. Li et al., Pruning Filters for Efficient ConvNets, ICLR 2017."""
    return _from_elements(scoring, scoring.weights, "sum")


def _l2(scoring: Scoring) -> Scores:
    """v = w, the L2 norm of the whole channel."""
    return _from_elements(scoring, scoring.weights, "channel")


def _bn_scale(scoring: Scoring) -> Scores:
    """v = gamma of BatchNorm, summed. Liu et al., Network Slimming, ICCV 2017."""
    scales = {name: scoring.weights[name] for name in sorted(scoring.batchnorm) if name.endswith(".weight")}
    return _from_elements(scoring, scales, "sum", missing="BatchNorm")


def _fpgm(scoring: Scoring) -> Scores:
    """Distance to all other filters. He et al., Filter Pruning via Geometric Median, CVPR 2019.

    s_m(c) = sum over c' of ||F_m(c) - F_m(c')||_2 for every member m that writes the channels: a weight of a linear
    or convolution with the channels on its output side. F_m(c) are all its elements of the channel: for attention
    with fused projections, the rows of query, key and value in one. torch-pruning 1.6.1 squares the elements before
    it takes distances, and counts input sides, too; the paper does neither.
    """
    scores = {}
    for group in scoring.groups:
        parts = []
        for member in group.members:
            name, _, leaf = member.parameter.rpartition(".")
            layer = scoring.model.model.get_submodule(name)
            if leaf == "weight" and isinstance(layer, (nn.Linear, nn.modules.conv._ConvNd)):
                is_transposed = isinstance(layer, nn.modules.conv._ConvTransposeNd)
                if member.dim == int(is_transposed):
                    rows = scoring.weights[member.parameter].double().movedim(member.dim, 0)
                    filters = rows[_positions(member.index).to(rows.device)].flatten(1)
                    parts.append(torch.cdist(filters, filters).sum(1).cpu())
        scores[group.name] = _put_together(parts, scoring, group.name, "weight that writes its channels")
    return scores, _from_groups(scoring, scores)


def _lamp(scoring: Scoring) -> Scores:
    """Squared L2 norm over that of all channels that are at least as large. Lee et al., LAMP, ICLR 2021.

    score(c) = ||c||^2 / sum of ||c'||^2 over c' with ||c'|| >= ||c||; the largest has 1. LAMP is for single weights;
    for channels of a group as in torch-pruning 1.6.1 (`GroupMagnitudeImportance._lamp`), but over all parameters of
    the channel, biases included. Sum or mean over members is the same here: a factor cancels.
    """
    scores, sums = {}, _sum_along(scoring, scoring.weights, "channel")
    for group in scoring.groups:
        squares = _reduce(scoring, group, sums, "channel").square()
        ordered, order = squares.sort(stable=True)
        rest = ordered.flip(0).cumsum(0).flip(0)
        scores[group.name] = torch.zeros_like(squares)
        scores[group.name][order] = ordered / rest.where(rest > 0, 1)
    return scores, _from_groups(scoring, scores)


def _activation_variance(scoring: Scoring) -> Scores:
    """Variance of what the next layers read of the channel, over images and positions.

    s_m(c) = sum over the positions of channel c in the input of a layer of the variances there, for every member m
    that is the weight of a linear or convolution that reads the channels (`find_reader`). So it is taken after norm
    and activation function: of the hidden channels of an MLP at its second linear, of attention at the output
    projection, of the residual stream at every layer that reads it, depthwise convolutions included.
    `score_batchnorm` has no say.
    """
    readers = {group.name: find_readers(scoring.model, group) for group in scoring.groups}
    layers = dict.fromkeys(layer for found in readers.values() for layer, _ in found)
    variances = input_variances(scoring.model, layers, scoring.batches, scoring.accelerator, scoring.precision)
    scores = {}
    for group, found in readers.items():
        parts = [variances[layer].cpu()[_positions(index)].sum(1) for layer, index in found]
        scores[group] = _put_together(parts, scoring, group, "layer that reads its channels")
    return scores, _from_groups(scoring, scores)


def _random(scoring: Scoring) -> Scores:
    """Uniform numbers: first the groups, then the blocks, in their order."""
    generator = torch.Generator().manual_seed(scoring.seed)
    scores = {group.name: torch.rand(group.channels, generator=generator) for group in scoring.groups}
    return scores, {block.name: torch.rand((), generator=generator).item() for block in scoring.blocks}


CRITERIA: dict[str, Callable[[Scoring], Scores]] = {
    "taylor": _taylor,
    "taylor_l2": _taylor_l2,
    "taylor_reference": _taylor_reference,
    "hessian": _hessian,
    "hessian_reference": _hessian_reference,
    "activation_variance": _activation_variance,
    "l1": _l1,
    "l2": _l2,
    "bn_scale": _bn_scale,
    "fpgm": _fpgm,
    "lamp": _lamp,
    "random": _random,
}


def _first_order(scoring: Scoring) -> Values:
    gradients = mean_gradients(scoring.model, scoring.weights, scoring.batches, scoring.accelerator, scoring.precision)
    return {name: weight * gradients.pop(name) for name, weight in scoring.weights.items()}


def _second_order(scoring: Scoring, measure: Callable[..., dict[str, torch.Tensor]]) -> Values:
    squares = measure(scoring.model, scoring.weights, scoring.batches, scoring.accelerator, scoring.precision)
    return {name: weight.square() * squares.pop(name) for name, weight in scoring.weights.items()}


def _from_elements(scoring: Scoring, values: Values, norm: Norm, missing: str = "parameter that counts") -> Scores:
    """Score groups as the module says, and blocks by the mean of |v|, or the root of the mean of v^2.

    Source:
        Fang et al., Isomorphic Pruning, ECCV 2024: its script for ConvNeXt ranks blocks by the mean of |w dL/dw|.
    """
    sums = _sum_along(scoring, values, norm)
    scores = {group.name: _reduce(scoring, group, sums, norm, missing) for group in scoring.groups}
    blocks = {}
    for block in scoring.blocks:
        parts = [values[name] for name in block.parameters if name in values]
        if not parts:
            _refuse(scoring, block.name, missing)
        total = sum(_sum_elements(part, norm != "sum", [0])[0].sum().item() for part in parts)
        mean = total / sum(part.numel() for part in parts)
        blocks[block.name] = mean if norm == "sum" else mean**0.5
    return scores, blocks


def _reduce(
    scoring: Scoring, group: CoupledGroup, sums: Sums, norm: Norm, missing: str = "parameter that counts"
) -> torch.Tensor:
    """Put the values of all elements of each channel together, as the module says: (channels,) in float64."""
    parts = []
    for member in group.members:
        if member.parameter in sums:
            part = sums[member.parameter][member.dim][_positions(member.index)].sum(1)
            parts.append(part.sqrt() if norm == "member" else part)
    score = _put_together(parts, scoring, group.name, missing)
    return score.sqrt() if norm == "channel" else score


def _sum_along(scoring: Scoring, values: Values, norm: Norm) -> Sums:
    """Sum |v|, or v^2, along every dim that channels of a group lie on: parameter -> dim -> sums on the CPU."""
    dims: dict[str, set[int]] = {}
    for member in (member for group in scoring.groups for member in group.members):
        dims.setdefault(member.parameter, set()).add(member.dim)
    return {
        name: {dim: along.cpu() for dim, along in _sum_elements(values[name], norm != "sum", sorted(own)).items()}
        for name, own in dims.items()
        if name in values
    }


def _sum_elements(value: torch.Tensor, squared: bool, dims: Sequence[int]) -> dict[int, torch.Tensor]:
    """Sum |v|, or v^2, in float64 over all dims but one, for each of `dims`.

    A few rows at a time, each read once for all dims: a whole copy would leave the cache.
    """
    value = value.reshape(-1) if value.ndim == 0 else value
    parts: dict[int, list[torch.Tensor]] = {dim: [] for dim in dims}
    for rows in value.split(max(1, _CHUNK * len(value) // value.numel())):
        wide = rows.double().square() if squared else rows.abs().double()
        if wide.ndim > 2 and max(dims) < 2:
            wide = wide.flatten(2).sum(2)
        for dim in dims:
            others = [other for other in range(wide.ndim) if other != dim]
            parts[dim].append(wide.sum(others) if others else wide)
    return {dim: torch.stack(found).sum(0) if dim else torch.cat(found) for dim, found in parts.items()}


def _positions(index: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(index))


def _put_together(parts: list[torch.Tensor], scoring: Scoring, name: str, what: str) -> torch.Tensor:
    if not parts:
        _refuse(scoring, name, what)
    return sum(parts) / (len(parts) if scoring.reduction == "mean" else 1)


def _refuse(scoring: Scoring, name: str, what: str) -> None:
    raise RecipeError(
        f"criterion {scoring.criterion} cannot score {name}, which has no {what}; take --prune.criterion l1"
    )


def _from_groups(scoring: Scoring, scores: Mapping[str, torch.Tensor]) -> dict[str, float]:
    """Score each block by the mean over the channels of the groups inside it; of those that reach into it, if none is.

    For criteria whose scores belong to channels and not to elements.
    """
    held = {
        group.name: {member.parameter for member in group.members if member.parameter in scoring.weights}
        for group in scoring.groups
    }
    blocks = {}
    for block in scoring.blocks:
        own = set(block.parameters)
        inside = [name for name, parameters in held.items() if parameters <= own]
        inside = inside or [name for name, parameters in held.items() if parameters & own]
        if not inside:
            _refuse(scoring, block.name, "channels of any group")
        blocks[block.name] = torch.cat([scores[name] for name in inside]).double().mean().item()
    return blocks
