"""Solve an allocation problem at given ratios: call `allocate`."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from isoprune_hf.pruning.deciding.allocation import Allocation, TiedGroups
from isoprune_hf.pruning.deciding.allocation_problem import AllocationProblem
from isoprune_hf.pruning.deciding.blocks import choose_blocks
from isoprune_hf.pruning.deciding.reference import threshold_counts
from isoprune_hf.pruning.deciding.rounding import best_units, keep_counts, round_counts, round_down
from isoprune_hf.pruning.deciding.settings import Ratios
from isoprune_hf.pruning.groups import CoupledGroup


class ChosenHeads(NamedTuple):
    """Attention group -> heads to keep, and the groups that a threshold would have emptied."""

    heads: dict[str, tuple[int, ...]]
    spared: set[str]


class ChosenWidths(NamedTuple):
    """Group -> width, the margin of each pool, and the groups that a threshold would have emptied."""

    widths: dict[str, int]
    margins: dict[str, Mapping[str, float]]
    spared: set[str]


def allocate(problem: AllocationProblem, ratios: Ratios) -> Allocation:
    """Choose what to keep of every group at the given ratios.

    In each scope exactly round(ratio x channels) are removed as far as the floors allow, lowest scores first and equal
    scores in the order of groups and channels; or, if `selection` is threshold, all up to a threshold. Widths are
    rounded afterwards.
    """
    removed_blocks = problem.fixed_blocks + choose_blocks(problem.blocks, problem.block_scores, ratios.block_ratio)
    groups = problem.groups_outside(removed_blocks)
    heads, spared_attentions = choose_heads(problem, groups, ratios.head_ratio)
    widths, margins, spared = choose_widths(problem, groups, heads, ratios)
    return Allocation(widths, heads, removed_blocks, margins, tuple(sorted(spared_attentions | spared)))


def choose_heads(problem: AllocationProblem, groups: Sequence[CoupledGroup], head_ratio: float) -> ChosenHeads:
    """Choose the heads to keep in every attention; the attentions of a scope compete by the mean score of a head."""
    pools: dict[str, list[TiedGroups]] = {}
    for tied in problem.tie([group for group in groups if group.num_heads]):
        pools.setdefault(problem.rules[tied.name].scope, []).append(tied)
    heads: dict[str, tuple[int, ...]] = {}
    spared: set[str] = set()
    for pool in pools.values():
        means = {
            group.name: problem.scores[group.name].reshape(group.num_heads, -1).mean(axis=1)
            for tied in pool
            for group in tied.groups
        }
        floors = {tied.name: problem.head_floor(tied.first) for tied in pool}
        units = {tied.name: np.mean([np.sort(means[g.name]) for g in tied.groups], axis=0) for tied in pool}
        if problem.settings.selection == "threshold":
            counts, _ = threshold_counts(units, floors, head_ratio)
            spared |= {name for name, count in counts.items() if count < floors[name]}
            counts = {name: max(count, floors[name]) for name, count in counts.items()}
        else:
            counts, _ = keep_counts(units, floors, head_ratio)
        for tied in pool:
            for group in tied.groups:
                heads[group.name] = tuple(sorted(best_units(means[group.name], counts[tied.name])))
    return ChosenHeads(heads, spared)


def choose_widths(
    problem: AllocationProblem,
    groups: Sequence[CoupledGroup],
    heads: Mapping[str, tuple[int, ...]],
    ratios: Ratios,
) -> ChosenWidths:
    """Choose the width of every group; the groups of one scope and ratio form a pool and compete."""
    settings = problem.settings
    pools: dict[tuple[str, float], list[TiedGroups]] = {}
    for tied in problem.tie(groups):
        key = problem.rules[tied.name].scope, problem.ratio_of(tied.first, ratios)
        pools.setdefault(key, []).append(tied)
    chosen = ChosenWidths({}, {}, set())
    for (_, ratio), pool in pools.items():
        units = {tied.name: problem.sorted_units(tied, heads) for tied in pool}
        floors = {tied.name: problem.floor(tied.first) for tied in pool}
        weights = {tied.name: sum(len(heads.get(group.name, (0,))) for group in tied.groups) for tied in pool}
        if settings.selection == "threshold":
            counts, margin = threshold_counts(units, floors, ratio)
        else:
            counts, margin = keep_counts(units, floors, ratio, weights)
        allowed = {tied.name: problem.allowed_widths(tied.first) for tied in pool}
        if settings.rounding == "down":
            rounded = round_down(counts, allowed)
        else:
            rounded = round_counts(counts, allowed, units, weights)
        for tied in pool:
            chosen.widths.update(dict.fromkeys((group.name for group in tied.groups), rounded[tied.name]))
        if settings.selection == "threshold":
            names = (name for name, count in counts.items() if count < rounded[name] < allowed[name][-1])
            chosen.spared.update(names)
        if margin is not None:
            chosen.margins[pool[0].name] = {name: _round(value) for name, value in margin.items()}
    return chosen


def _round(score: float) -> float:
    """Round to four digits: the others depend on the number of threads and ranks, and the plan should not."""
    return float(f"{score:.3e}")
