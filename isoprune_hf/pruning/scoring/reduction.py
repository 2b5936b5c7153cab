"""Reduce the values of elements to one score for each channel and each block.

`score_elements` does both; which values, is decided in `criteria`. Values v become the score of channel c of a group
with members m (weights, biases, norms, tokens), where m(c) are the elements of m at the positions m.index[c] on its
dim, by one of three norms:

    sum      s_m(c) = sum of |v| over m(c)            score(c) = R over m of s_m(c)
    member   s_m(c) = (sum of v^2 over m(c))^(1/2)    score(c) = R over m of s_m(c)
    channel  s_m(c) = sum of v^2 over m(c)            score(c) = (R over m of s_m(c))^(1/2)

R is the sum, or the mean over the members that have values: buffers have none, and neither has BatchNorm if it is not
scored.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from functools import reduce
from typing import Literal, NoReturn

import numpy as np
import torch

from isoprune_hf.pruning.groups import CoupledGroup, ResidualBlock
from isoprune_hf.pruning.scoring.criteria.criterion import RawScores, ScoringTask, UnscoredError, Values

_CHUNK_ELEMENTS = 2**17  # summed at once: one MiB in float64, which fits into the cache
_SCORED_PARAMETER = "parameter that counts"
Norm = Literal["sum", "member", "channel"]
DimSums = Mapping[str, Mapping[int, torch.Tensor]]  # parameter -> dim -> sums over all other dims


class _ElementSums:
    """Sums |v| or v^2 in float64, a few rows at a time: a float64 copy of a large tensor would not fit into the cache.

    All tensors share the memory of these rows: freed after each, it would leave holes in the heap that no later rows
    fit into, a MiB for each tensor.
    """

    def __init__(self, norm: Norm) -> None:
        self._squared = norm != "sum"
        self._room = torch.empty(_CHUNK_ELEMENTS, dtype=torch.float64)

    def along(self, value: torch.Tensor, dims: Sequence[int]) -> dict[int, torch.Tensor]:
        """Sum over all dims but one, for each of `dims`; the tensor is read once."""
        value = value.reshape(-1) if value.ndim == 0 else value
        chunk = self._chunk_for(value)
        rows = chunk.new_empty(len(value))
        columns = chunk.new_zeros(value.shape[1:])
        for part, sums in zip(torch.split(value, len(chunk)), torch.split(rows, len(chunk)), strict=True):
            wide = chunk[: len(part)].copy_(part)
            wide = wide.square_() if self._squared else wide.abs_()
            torch.sum(wide.flatten(1) if wide.ndim > 1 else wide[:, None], 1, out=sums)
            if max(dims):
                columns += wide.sum(0)
        found = {0: rows}
        for dim in set(dims) - {0}:
            others = [other for other in range(value.ndim - 1) if other != dim - 1]
            found[dim] = columns.sum(others) if others else columns
        return {dim: found[dim] for dim in dims}

    def _chunk_for(self, value: torch.Tensor) -> torch.Tensor:
        """Return memory for some rows of a tensor; rows that are too large, or elsewhere, get memory of their own."""
        width = max(1, math.prod(value.shape[1:]))
        shape = (max(1, min(len(value), _CHUNK_ELEMENTS // width)), *value.shape[1:])
        if value.device != self._room.device or math.prod(shape) > len(self._room):
            return self._room.new_empty(shape, device=value.device)
        return self._room[: math.prod(shape)].view(shape)


def score_elements(task: ScoringTask, values: Values, norm: Norm, missing: str = _SCORED_PARAMETER) -> RawScores:
    """Score groups by the formulas of the module, and blocks by the mean of |v| or the root of the mean of v^2.

    Args:
        task: Groups and blocks to score.
        values: Parameter -> values of its elements.
        norm: Formula of the module; a block has the mean of |v| for `sum`, the root of the mean of v^2 for the others.
        missing: What a group or block without any values lacks, for notes.

    Source:
        Fang et al., Isomorphic Pruning, ECCV 2024: its script for ConvNeXt ranks blocks by the mean of |w dL/dw|.
    """
    sums = sum_along(task, values, norm)
    elements = _ElementSums(norm)

    def score_block(block: ResidualBlock) -> float:
        parts = [values[name] for name in block.parameters if name in values]
        if not parts:
            refuse_unscored(task, block.name, missing)
        total = sum(elements.along(part, [0])[0].sum().item() for part in parts)
        mean = total / sum(part.numel() for part in parts)
        return float(mean if norm == "sum" else mean**0.5)

    return score_each(task, lambda group: reduce_members(task, group, sums, norm, missing), score_block)


def score_each(
    task: ScoringTask,
    score_group: Callable[[CoupledGroup], torch.Tensor],
    score_block: Callable[[ResidualBlock], float] | None = None,
) -> RawScores:
    """Score all groups and blocks of a task; those for which a function raises an UnscoredError have no scores.

    Args:
        task: Groups and blocks to score.
        score_group: Returns the scores of a group: (channels,).
        score_block: Returns the score of a block; by default the mean over the channels of groups inside it.
    """
    scored = RawScores({}, {}, {})
    for group in task.groups:
        try:
            scored.groups[group.name] = score_group(group)
        except UnscoredError as error:
            scored.unscored[group.name] = error.missing
    for block in task.blocks:
        try:
            mean = _mean_of_channels(task, scored.groups, block) if score_block is None else score_block(block)
            scored.blocks[block.name] = mean
        except UnscoredError as error:
            scored.unscored[block.name] = error.missing
    return scored


def reduce_members(
    task: ScoringTask, group: CoupledGroup, sums: DimSums, norm: Norm, missing: str = _SCORED_PARAMETER
) -> torch.Tensor:
    """Combine the values of all elements of each channel by the formulas of the module: (channels,) in float64."""
    parts = []
    for member in group.members:
        if member.parameter in sums:
            part = sums[member.parameter][member.dim][positions(member.index)].sum(1)
            parts.append(part.sqrt() if norm == "member" else part)
    score = combine_members(task, group.name, parts, missing)
    return score.sqrt() if norm == "channel" else score


def sum_along(task: ScoringTask, values: Values, norm: Norm) -> DimSums:
    """Sum |v| or v^2 over all dims but one, for each dim on which a group has its channels; on the CPU."""
    dims: dict[str, set[int]] = {}
    for member in (member for group in task.groups for member in group.members):
        dims.setdefault(member.parameter, set()).add(member.dim)
    elements = _ElementSums(norm)
    return {
        name: {dim: sums.cpu() for dim, sums in elements.along(values[name], sorted(own)).items()}
        for name, own in dims.items()
        if name in values
    }


def positions(index: np.ndarray) -> torch.Tensor:
    """Convert positions to a tensor that can be used as an index."""
    return torch.from_numpy(np.ascontiguousarray(index))


def combine_members(task: ScoringTask, name: str, parts: Sequence[torch.Tensor], missing: str) -> torch.Tensor:
    """Combine the scores of the members of each channel: R of the module.

    Args:
        task: Its `reduction` is sum or mean.
        name: Name of the group.
        parts: Scores of shape (channels,), one tensor for each member that has any.
        missing: What a group without any lacks, for notes.

    Raises:
        UnscoredError: There are no parts.
    """
    if not parts:
        refuse_unscored(task, name, missing)
    total = reduce(torch.add, parts)
    return total / len(parts) if task.reduction == "mean" else total


def refuse_unscored(task: ScoringTask, name: str, missing: str) -> NoReturn:
    """Raise an UnscoredError for a group or block that has nothing that the criterion of the task scores."""
    raise UnscoredError(
        f"criterion {task.criterion} cannot score {name}, which has no {missing}; use --prune.criterion l1", missing
    )


def _mean_of_channels(task: ScoringTask, scores: Mapping[str, torch.Tensor], block: ResidualBlock) -> float:
    """Return the mean score over the channels of the groups that lie completely inside a block.

    If there is none, the groups that share a parameter with the block are used.

    Raises:
        UnscoredError: No group that has scores shares a parameter with the block.
    """
    scored = {
        group.name: {member.parameter for member in group.members if member.parameter in task.weights}
        for group in task.groups
        if group.name in scores
    }
    own = set(block.parameters)
    inside = [name for name, parameters in scored.items() if parameters <= own]
    inside = inside or [name for name, parameters in scored.items() if parameters & own]
    if not inside:
        refuse_unscored(task, block.name, "channels of any group")
    return float(torch.cat([scores[name] for name in inside]).double().mean().item())
