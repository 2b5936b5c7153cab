"""Allocation `knapsack`: the units that save most for the least loss are removed first, over all classes at once.

Scores must be losses, as those of gate_fisher are; the loss of several units is the sum of theirs. The saving of a
unit depends on the widths around it, so the cut is made in rounds: each covers a small part of the distance to the
budget, by the savings at the current widths.
"""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from itertools import pairwise
from typing import NamedTuple

import numpy as np

from isoprune_hf.errors import RecipeError
from isoprune_hf.pruning.cost.macs import CostModel
from isoprune_hf.pruning.deciding.allocation import Allocation, TiedGroups
from isoprune_hf.pruning.deciding.allocation_problem import AllocationProblem
from isoprune_hf.pruning.deciding.budget import BudgetLimit, budget_note, check_reachable
from isoprune_hf.pruning.deciding.choose import allocate
from isoprune_hf.pruning.deciding.refill import Gain, movable_groups, refill, swap_widths
from isoprune_hf.pruning.deciding.settings import Ratios
from isoprune_hf.pruning.deciding.solution import Solution
from isoprune_hf.pruning.groups import CoupledGroup

_SHARE_PER_ROUND = 0.1  # of the distance to the budget
_MIN_FIGURE = 1e-12


class CandidateCut(NamedTuple):
    """A cut of tied groups that a round may apply, after all cheaper ones of the same groups.

    Args:
        rate: Loss per saved figure.
        position: Position among the movable groups; breaks ties of `rate`.
        saved: Saved MACs, parameters or milliseconds.
        tied: Groups of equal width.
        width: Their width after the cut.
        heads: Attention group -> heads to keep, if the cut removes a head.
    """

    rate: float
    position: int
    saved: float
    tied: TiedGroups
    width: int
    heads: Mapping[str, tuple[int, ...]] | None = None

    def apply(self, allocation: Allocation) -> Allocation:
        """Return the allocation after this cut."""
        if self.heads is not None:
            return replace(allocation, heads={**allocation.heads, **self.heads})
        return allocation.resized(self.tied, self.width)


def allocate_knapsack(problem: AllocationProblem, limit: BudgetLimit | None, cost: CostModel | None) -> Solution:
    """Apply the cheapest cuts until the budget is met, then use up the remainder; see `Allocator`.

    Without a budget as many MACs are kept as allocation `class` would keep. Kinds with the ratio 0 are not cut.
    """
    if limit is None:
        limit = _same_macs(problem, cost)
    smallest = allocate(problem, problem.ratios.deepest())
    check_reachable(limit, limit.measure(problem, smallest), problem.settings.widths)
    allocation = allocate(problem, Ratios(0.0, 0.0, 0.0))
    while (figure := limit.measure(problem, allocation)) > limit.target:
        candidates = sorted(_candidate_cuts(problem, limit, allocation, figure), key=lambda cut: cut[:2])
        goal = _SHARE_PER_ROUND * (figure - limit.target)
        saved = 0.0
        for cut in candidates:
            allocation = cut.apply(allocation)
            saved += cut.saved
            if saved >= goal:
                break
        if not candidates:  # no single group saves anything, as with steps of a measured latency
            allocation = smallest
    allocation = refill(problem, allocation, limit, _loss_rate(problem, limit))
    allocation = swap_widths(problem, allocation, limit)
    return Solution(allocation, problem.ratios, budget_note(problem, allocation, limit))


def _same_macs(problem: AllocationProblem, cost: CostModel | None) -> BudgetLimit:
    """Return the MACs that the ratios keep if every class gives up the same fraction."""
    if cost is None:
        raise RecipeError("prune.allocation knapsack needs the cost of `cost_model`: pass it to make_plan")
    target = cost.cost(*problem.removed_units(allocate(problem, problem.ratios))).macs
    return BudgetLimit("ratio", target, cost.base.macs, lambda removed: cost.cost(*removed).macs)


def _candidate_cuts(
    problem: AllocationProblem, limit: BudgetLimit, allocation: Allocation, figure: float
) -> Iterator[CandidateCut]:
    ratios = problem.ratios
    for position, tied in enumerate(movable_groups(problem, allocation)):
        group = tied.first
        if ratios.head_dim_ratio if group.num_heads else ratios.ratio:
            yield from _narrower_widths(problem, limit, allocation, figure, tied, position)
        if ratios.head_ratio and len(allocation.heads.get(group.name, ())) > problem.head_floor(group):
            losses, heads = zip(*(_drop_head(problem, allocation, group) for group in tied.groups), strict=True)
            cut = CandidateCut(0.0, position, 0.0, tied, allocation.widths[group.name], dict(heads))
            saved = figure - limit.measure(problem, cut.apply(allocation))
            if saved > 0:
                yield cut._replace(rate=sum(losses) / saved, saved=saved)


def _drop_head(
    problem: AllocationProblem, allocation: Allocation, group: CoupledGroup
) -> tuple[float, tuple[str, tuple[int, ...]]]:
    """Return the loss of the weakest head, summed over its kept dims, and (group, heads) without it."""
    by_head = np.sort(problem.scores[group.name].reshape(group.num_heads, -1), axis=1)
    losses = by_head[:, -allocation.widths[group.name] :].sum(axis=1)
    heads = allocation.heads[group.name]
    weakest = min(heads, key=lambda head: float(losses[head]))
    return float(losses[weakest]), (group.name, tuple(head for head in heads if head != weakest))


def _narrower_widths(
    problem: AllocationProblem,
    limit: BudgetLimit,
    allocation: Allocation,
    figure: float,
    tied: TiedGroups,
    position: int,
) -> Iterator[CandidateCut]:
    """Yield a cut for every lower width; a figure is linear in one width while the others are constant."""
    width = allocation.widths[tied.name]
    widths = [width, *(lower for lower in reversed(problem.allowed_widths(tied.first)) if lower < width)]
    if len(widths) == 1:
        return
    first = allocation.resized(tied, widths[1])
    per_unit = (figure - limit.measure(problem, first)) / (width - widths[1])
    if per_unit <= 0:
        return
    rate = 0.0
    for upper, lower in pairwise(widths):
        saved = per_unit * (upper - lower)
        rate = max(rate, _loss(problem, allocation, tied, lower, upper) / saved)
        yield CandidateCut(rate, position, saved, tied, lower)


def _loss(problem: AllocationProblem, allocation: Allocation, tied: TiedGroups, lower: int, upper: int) -> float:
    """Return the loss of narrowing tied groups from width `upper` to `lower`."""
    units = problem.sorted_units(tied, allocation.heads)[::-1]
    return float(units[lower:upper].sum()) * sum(len(allocation.heads.get(group.name, (0,))) for group in tied.groups)


def _loss_rate(problem: AllocationProblem, limit: BudgetLimit) -> Gain:
    """Return the avoided loss per added figure."""

    def gain(allocation: Allocation, tied: TiedGroups, lower: int, upper: int) -> float:
        added = limit.measure(problem, allocation.resized(tied, upper)) - limit.measure(problem, allocation)
        return _loss(problem, allocation, tied, lower, upper) / max(added, _MIN_FIGURE)

    return gain
