"""From values of elements to scores of channels and blocks; which values, is the business of `criteria.py`.

How values v become the score of channel c of a group with members m (weights, biases, norms, tokens), where m(c) are
the elements of m at the positions m.index[c] on its dim:

    sum      s_m(c) = sum of |v| over m(c)            score(c) = R over m of s_m(c)
    member   s_m(c) = (sum of v^2 over m(c))^(1/2)    score(c) = R over m of s_m(c)
    channel  s_m(c) = sum of v^2 over m(c)            score(c) = (R over m of s_m(c))^(1/2)

R is the sum, or the mean over the members that hold values: buffers do not, nor does BatchNorm where it is left out.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NoReturn

import numpy as np
import torch
from accelerate import Accelerator
from torch import nn

from isoprune_hf.errors import RecipeError
from isoprune_hf.pruning.calibration.gradients import Batches, Precision
from isoprune_hf.pruning.groups import CoupledGroup, ResidualBlock

_CHUNK = 2**17  # elements that are summed at once: a mebibyte in float64, which stays in the cache
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


def score_elements(scoring: Scoring, values: Values, norm: Norm, missing: str = "parameter that counts") -> Scores:
    """Score groups as the module says, and blocks by the mean of |v|, or the root of the mean of v^2.

    Source:
        Fang et al., Isomorphic Pruning, ECCV 2024: its script for ConvNeXt ranks blocks by the mean of |w dL/dw|.
    """
    sums = sum_along(scoring, values, norm)
    scores = {group.name: reduce_members(scoring, group, sums, norm, missing) for group in scoring.groups}
    blocks = {}
    for block in scoring.blocks:
        parts = [values[name] for name in block.parameters if name in values]
        if not parts:
            refuse_score(scoring, block.name, missing)
        total = sum(_sum_elements(part, norm != "sum", [0])[0].sum().item() for part in parts)
        mean = total / sum(part.numel() for part in parts)
        blocks[block.name] = mean if norm == "sum" else mean**0.5
    return scores, blocks


def reduce_members(
    scoring: Scoring, group: CoupledGroup, sums: Sums, norm: Norm, missing: str = "parameter that counts"
) -> torch.Tensor:
    """Put the values of all elements of each channel together, as the module says: (channels,) in float64."""
    parts = []
    for member in group.members:
        if member.parameter in sums:
            part = sums[member.parameter][member.dim][positions(member.index)].sum(1)
            parts.append(part.sqrt() if norm == "member" else part)
    score = put_together(parts, scoring, group.name, missing)
    return score.sqrt() if norm == "channel" else score


def sum_along(scoring: Scoring, values: Values, norm: Norm) -> Sums:
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
    rows, columns = [], 0.0
    for part in value.split(max(1, _CHUNK * len(value) // value.numel())):
        wide = part.to(torch.float64, copy=True)
        wide = wide.square_() if squared else wide.abs_()
        rows.append(wide.flatten(1).sum(1) if wide.ndim > 1 else wide)
        columns = columns + wide.sum(0) if max(dims) else columns
    sums = {0: torch.cat(rows)}
    for dim in set(dims) - {0}:
        others = [other for other in range(value.ndim - 1) if other != dim - 1]
        sums[dim] = columns.sum(others) if others else columns
    return {dim: sums[dim] for dim in dims}


def positions(index: np.ndarray) -> torch.Tensor:
    """Give positions as a tensor to index with."""
    return torch.from_numpy(np.ascontiguousarray(index))


def put_together(parts: list[torch.Tensor], scoring: Scoring, name: str, what: str) -> torch.Tensor:
    """Sum what the members of a channel are worth, or take the mean: R of the module."""
    if not parts:
        refuse_score(scoring, name, what)
    return sum(parts) / (len(parts) if scoring.reduction == "mean" else 1)


def refuse_score(scoring: Scoring, name: str, what: str) -> NoReturn:
    """Refuse a group or block that holds nothing that the criterion looks at."""
    raise RecipeError(
        f"criterion {scoring.criterion} cannot score {name}, which has no {what}; take --prune.criterion l1"
    )


def score_blocks(scoring: Scoring, scores: Mapping[str, torch.Tensor]) -> dict[str, float]:
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
            refuse_score(scoring, block.name, "channels of any group")
        blocks[block.name] = torch.cat([scores[name] for name in inside]).double().mean().item()
    return blocks
