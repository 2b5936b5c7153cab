"""Allocation `knapsack`: the units that save most for the least loss are removed first, over all classes at once.

Scores must be losses, as those of gate_fisher are; the loss of several units is the sum of theirs. The saving of a
unit depends on the widths around it, so the cut is made in rounds: each covers a small part of the distance to the
budget, by the savings at the current widths.
"""

import heapq
from bisect import bisect_left
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from operator import neg
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

    Cuts compare by their first two fields: no two streams of cuts have one position.

    Args:
        rate: Loss per saved figure.
        position: Position of its stream among those of the round; breaks ties of `rate`.
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


class NarrowerWidths(NamedTuple):
    """The allowed widths of tied groups, descending, and the loss of the step from each to the next one."""

    widths: Sequence[int]
    losses: Sequence[float]


class LossTables:
    """The losses of all narrower widths; those of tied groups are computed once for the heads that they keep."""

    def __init__(self, problem: AllocationProblem):
        self._problem = problem
        self._tables: dict[tuple[object, ...], NarrowerWidths] = {}

    def of(self, tied: TiedGroups, allocation: Allocation) -> NarrowerWidths:
        """Return the table of tied groups for the heads that an allocation keeps."""
        key = tied.name, *(allocation.heads.get(group.name) for group in tied.groups)
        if key not in self._tables:
            widths = self._problem.allowed_widths(tied.first)[::-1]
            self._tables[key] = NarrowerWidths(widths, _losses(self._problem, allocation, tied, widths))
        return self._tables[key]


class Round(NamedTuple):
    """The state that the cuts of one round start from.

    Args:
        problem: Scores, floors and allowed widths.
        limit: The budget.
        tables: Losses of all narrower widths.
        allocation: The allocation before the round.
        figure: Its figure.
    """

    problem: AllocationProblem
    limit: BudgetLimit
    tables: LossTables
    allocation: Allocation
    figure: float

    def saving(self, allocation: Allocation) -> float:
        """Compute how much of the figure another allocation saves."""
        return self.figure - self.limit.measure(self.problem, allocation)


def allocate_knapsack(problem: AllocationProblem, limit: BudgetLimit | None, cost: CostModel | None) -> Solution:
    """Apply the cheapest cuts until the budget is met, then use up the remainder; see `Allocator`.

    Without a budget as many MACs are kept as allocation `class` would keep. Kinds with the ratio 0 are not cut.
    """
    if limit is None:
        limit = _same_macs(problem, cost)
    smallest = allocate(problem, problem.ratios.deepest())
    check_reachable(limit, limit.measure(problem, smallest), problem.settings.widths)
    allocation = allocate(problem, Ratios(0.0, 0.0, 0.0))
    tables = LossTables(problem)
    while (figure := limit.measure(problem, allocation)) > limit.target:
        narrower = next_allocation(Round(problem, limit, tables, allocation, figure))
        # If no single group saves anything, as with steps of a measured latency, only the smallest model is left.
        allocation = smallest if narrower is allocation else narrower
    allocation = refill(problem, allocation, limit, _loss_rate(problem, limit))
    allocation = swap_widths(problem, allocation, limit)
    return Solution(allocation, problem.ratios, budget_note(problem, allocation, limit))


def next_allocation(start: Round) -> Allocation:
    """Apply the cheapest cuts that save a share of the distance to the budget together; see the module."""
    goal = _SHARE_PER_ROUND * (start.figure - start.limit.target)
    saved = 0.0
    last: dict[int, CandidateCut] = {}  # a cut replaces the earlier ones of its stream
    for cut in heapq.merge(*_candidate_cuts(start)):
        last[cut.position] = cut
        saved += cut.saved
        if saved >= goal:
            break
    allocation = start.allocation
    for cut in last.values():
        allocation = cut.apply(allocation)
    return allocation


def _same_macs(problem: AllocationProblem, cost: CostModel | None) -> BudgetLimit:
    """Return the MACs that the ratios keep if every class gives up the same fraction."""
    if cost is None:
        raise RecipeError("prune.allocation knapsack needs the cost of `cost_model`: pass it to make_plan")
    target = cost.cost(*problem.removed_units(allocate(problem, problem.ratios))).macs
    return BudgetLimit("ratio", target, cost.base.macs, lambda removed: cost.cost(*removed).macs)


def _candidate_cuts(start: Round) -> Iterator[Iterator[CandidateCut]]:
    """Yield streams of cuts, each with ascending rates: of the widths and of the heads of all movable groups."""
    problem, allocation = start.problem, start.allocation
    ratios = problem.ratios
    for number, tied in enumerate(movable_groups(problem, allocation)):
        group = tied.first
        if ratios.head_dim_ratio if group.num_heads else ratios.ratio:
            yield _narrower_widths(start, tied, 2 * number)
        if ratios.head_ratio and len(allocation.heads.get(group.name, ())) > problem.head_floor(group):
            losses, heads = zip(*(_drop_head(problem, allocation, group) for group in tied.groups), strict=True)
            cut = CandidateCut(0.0, 2 * number + 1, 0.0, tied, allocation.widths[group.name], dict(heads))
            saved = start.saving(cut.apply(allocation))
            if saved > 0:
                yield iter([cut._replace(rate=sum(losses) / saved, saved=saved)])


def _drop_head(
    problem: AllocationProblem, allocation: Allocation, group: CoupledGroup
) -> tuple[float, tuple[str, tuple[int, ...]]]:
    """Return the loss of the weakest head, summed over its kept dims, and (group, heads) without it."""
    by_head = np.sort(problem.scores[group.name].reshape(group.num_heads, -1), axis=1)
    losses = by_head[:, -allocation.widths[group.name] :].sum(axis=1)
    heads = allocation.heads[group.name]
    weakest = min(heads, key=lambda head: float(losses[head]))
    return float(losses[weakest]), (group.name, tuple(head for head in heads if head != weakest))


def _narrower_widths(start: Round, tied: TiedGroups, position: int) -> Iterator[CandidateCut]:
    """Yield a cut for every lower width; a figure is linear in one width while the others are constant.

    Where kernels compute whole blocks, a latency is linear in the widths that are multiples of the block; that of the
    base may be another one, so that the first step from there has a saving of its own.
    """
    widths, losses = start.tables.of(tied, start.allocation)
    first = bisect_left(widths, -start.allocation.widths[tied.name], key=neg)
    if first == len(losses):
        return
    saved = start.saving(start.allocation.resized(tied, widths[first + 1]))
    per_unit = saved / (widths[first] - widths[first + 1])
    if first + 1 < len(losses) and widths[first] - widths[first + 1] != widths[first + 1] - widths[first + 2]:
        lowest = start.saving(start.allocation.resized(tied, widths[-1]))
        per_unit = (lowest - saved) / (widths[first + 1] - widths[-1])
    if min(saved, per_unit) <= 0:
        return
    rate = 0.0
    for number in range(first, len(losses)):
        if number > first:
            saved = per_unit * (widths[number] - widths[number + 1])
        rate = max(rate, losses[number] / saved)
        yield CandidateCut(rate, position, saved, tied, widths[number + 1])


def _losses(
    problem: AllocationProblem, allocation: Allocation, tied: TiedGroups, widths: Sequence[int]
) -> list[float]:
    """Return the loss of narrowing tied groups from each of some descending widths to the next one."""
    units = problem.sorted_units(tied, allocation.heads)[::-1]
    if widths[0] - widths[-1] == len(widths) - 1:  # steps of one unit
        losses = units[widths[-1] : widths[0]][::-1].tolist()
    else:
        losses = [float(units[lower:upper].sum()) for upper, lower in pairwise(widths)]
    weight = sum(len(allocation.heads.get(group.name, (0,))) for group in tied.groups)
    return [loss * weight for loss in losses]


def _loss_rate(problem: AllocationProblem, limit: BudgetLimit) -> Gain:
    """Return the avoided loss per added figure."""

    def gain(allocation: Allocation, tied: TiedGroups, lower: int, upper: int) -> float:
        added = limit.measure(problem, allocation.resized(tied, upper)) - limit.measure(problem, allocation)
        return _losses(problem, allocation, tied, (upper, lower))[0] / max(added, _MIN_FIGURE)

    return gain
