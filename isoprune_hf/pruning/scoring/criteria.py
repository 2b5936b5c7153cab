"""What a channel is worth: one function for each criterion.

A criterion gives every element of every parameter a value, or every channel of a group a score of its own. How the
values become scores: `channel_scores.py`. It knows neither who competes with whom nor how much leaves; scores of
different groups are made comparable elsewhere (`ranking.py`). To add one: write a function here, name it in
`CRITERIA` and in `recipes.Criterion`.
"""

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import nn

from isoprune_hf.pruning.calibration.gradients import mean_gradients
from isoprune_hf.pruning.graph.layers import ConvNd, ConvTransposeNd
from isoprune_hf.pruning.scoring.fisher import last_squared_gradient, mean_squared_gradients
from isoprune_hf.pruning.scoring.gate_fisher import gate_fisher
from isoprune_hf.pruning.scoring.readers import find_readers, input_variances
from isoprune_hf.pruning.scoring.reduction import (
    Scores,
    Scoring,
    Values,
    positions,
    put_together,
    reduce_members,
    score_blocks,
    score_elements,
    sum_along,
)
from isoprune_hf.pruning.scoring.reference import counted_weights


def _taylor(scoring: Scoring) -> Scores:
    """v = w dL/dw, summed. Molchanov et al., Importance Estimation for Neural Network Pruning, CVPR 2019."""
    return score_elements(scoring, _first_order(scoring), "sum")


def _taylor_l2(scoring: Scoring) -> Scores:
    """v = w dL/dw, the L2 norm of each slice. Fang et al., Isomorphic Pruning, ECCV 2024."""
    return score_elements(scoring, _first_order(scoring), "member")


def _taylor_reference(scoring: Scoring) -> Scores:
    """The same over what torch-pruning counts: for parity only (see `counted_weights`)."""
    return _taylor(replace(scoring, weights=counted_weights(scoring.model.model, scoring.weights)))


def _hessian(scoring: Scoring) -> Scores:
    """v = w^2 E[g_n^2], summed. Le Cun et al., Optimal Brain Damage, NeurIPS 1989, without its factor 1/2."""
    return score_elements(scoring, _second_order(scoring, mean_squared_gradients), "sum")


def _hessian_reference(scoring: Scoring) -> Scores:
    """v = w^2 g^2 of the last image alone: a defect, for parity only (see `last_squared_gradient`)."""
    return score_elements(scoring, _second_order(scoring, last_squared_gradient), "sum")


def _gate_fisher(scoring: Scoring) -> Scores:
    """E[g_n^2] / 2, with g_n the derivative of image n's loss by a gate on the channel (see `gates.py`)."""
    scores = gate_fisher(scoring.model, scoring.groups, scoring.batches, scoring.accelerator, scoring.precision)
    return scores, score_blocks(scoring, scores)


def _gate_fisher_joint(scoring: Scoring) -> Scores:
    """1_S^T E[g_n g_n^T] 1_S / 2 for the set S of a channel and all cheaper ones, less that without it."""
    scores = gate_fisher(
        scoring.model, scoring.groups, scoring.batches, scoring.accelerator, scoring.precision, is_joint=True
    )
    return scores, score_blocks(scoring, scores)


def _l1(scoring: Scoring) -> Scores:
    """v = w, summed. Li et al., Pruning Filters for Efficient ConvNets, ICLR 2017."""
    return score_elements(scoring, scoring.weights, "sum")


def _l2(scoring: Scoring) -> Scores:
    """v = w, the L2 norm of the whole channel."""
    return score_elements(scoring, scoring.weights, "channel")


def _bn_scale(scoring: Scoring) -> Scores:
    """v = gamma of BatchNorm, summed. Liu et al., Network Slimming, ICCV 2017."""
    scales = {name: scoring.weights[name] for name in sorted(scoring.batchnorm) if name.endswith(".weight")}
    return score_elements(scoring, scales, "sum", missing="BatchNorm")


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
            if leaf == "weight" and isinstance(layer, (nn.Linear, ConvNd)):
                is_transposed = isinstance(layer, ConvTransposeNd)
                if member.dim == int(is_transposed):
                    rows = scoring.weights[member.parameter].double().movedim(member.dim, 0)
                    filters = rows[positions(member.index).to(rows.device)].flatten(1)
                    parts.append(torch.cdist(filters, filters).sum(1).cpu())
        scores[group.name] = put_together(parts, scoring, group.name, "weight that writes its channels")
    return scores, score_blocks(scoring, scores)


def _lamp(scoring: Scoring) -> Scores:
    """Squared L2 norm over that of all channels that are at least as large. Lee et al., LAMP, ICLR 2021.

    score(c) = ||c||^2 / sum of ||c'||^2 over c' with ||c'|| >= ||c||; the largest has 1. LAMP is for single weights;
    for channels of a group as in torch-pruning 1.6.1 (`GroupMagnitudeImportance._lamp`), but over all parameters of
    the channel, biases included. Sum or mean over members is the same here: a factor cancels.
    """
    scores, sums = {}, sum_along(scoring, scoring.weights, "channel")
    for group in scoring.groups:
        squares = reduce_members(scoring, group, sums, "channel").square()
        ordered, order = squares.sort(stable=True)
        rest = ordered.flip(0).cumsum(0).flip(0)
        scores[group.name] = torch.zeros_like(squares)
        scores[group.name][order] = ordered / rest.where(rest > 0, 1)
    return scores, score_blocks(scoring, scores)


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
        parts = [variances[layer].cpu()[positions(index)].sum(1) for layer, index in found]
        scores[group] = put_together(parts, scoring, group, "layer that reads its channels")
    return scores, score_blocks(scoring, scores)


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
    "gate_fisher": _gate_fisher,
    "gate_fisher_joint": _gate_fisher_joint,
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
