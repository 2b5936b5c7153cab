"""Use up a budget: `refill` widens groups while the budget allows, `swap_widths` trades one group for another."""

import heapq
from bisect import bisect_right
from collections.abc import Callable, Sequence
from typing import NamedTuple

from isoprune_hf.pruning.deciding.allocation import Allocation, TiedGroups
from isoprune_hf.pruning.deciding.allocation_problem import AllocationProblem
from isoprune_hf.pruning.deciding.budget import UNUSED_SHARE_TOLERANCE, BudgetLimit

# (allocation, tied groups, width, larger width) -> value of widening them; the highest value is widened first.
Gain = Callable[[Allocation, TiedGroups, int, int], float]
_MAX_TRIED_SWAPS = 4000


class Trial(NamedTuple):
    """An allocation and its figure."""

    allocation: Allocation
    figure: float


def refill(problem: AllocationProblem, allocation: Allocation, limit: BudgetLimit, gain: Gain) -> Allocation:
    """Widen groups while the budget allows, the next allowed width of highest gain first."""
    movable = resizable_groups(problem, allocation)
    allowed = {tied.name: problem.allowed_widths(tied.first) for tied in movable}
    queue: list[tuple[float, int, int]] = []

    def push(position: int) -> None:
        tied = movable[position]
        width = allocation.widths[tied.name]
        wider = _next_width(allowed[tied.name], width)
        if wider is not None:
            heapq.heappush(queue, (-gain(allocation, tied, width, wider), position, wider))

    for position in range(len(movable)):
        push(position)
    while queue:
        _, position, wider = heapq.heappop(queue)
        trial = allocation.resized(movable[position], wider)
        if limit.measure(problem, trial) <= limit.target:
            allocation = trial
            push(position)
    return allocation


def swap_widths(problem: AllocationProblem, allocation: Allocation, limit: BudgetLimit) -> Allocation:
    """Widen one group by a step and narrow another until the budget holds, while much of the budget is unused.

    In each round the pair that comes nearest to the budget is swapped.
    """
    movable = resizable_groups(problem, allocation)
    allowed = {tied.name: problem.allowed_widths(tied.first) for tied in movable}
    tried = 0
    best = Trial(allocation, limit.measure(problem, allocation))
    while best.figure < (1 - UNUSED_SHARE_TOLERANCE) * limit.target:
        start = best
        for widened in movable:
            wider = _next_width(allowed[widened.name], start.allocation.widths[widened.name])
            if wider is None:
                continue
            for narrowed in movable:
                if widened is narrowed or tried >= _MAX_TRIED_SWAPS:
                    continue
                tried += 1
                changed = start.allocation.resized(widened, wider)
                trial = _narrow_to_fit(problem, changed, limit, narrowed, allowed[narrowed.name])
                if best.figure < trial.figure <= limit.target:
                    best = trial
        if best is start:
            break
    return best.allocation


def movable_groups(problem: AllocationProblem, allocation: Allocation) -> list[TiedGroups]:
    """Return the tied groups that a budget may resize or rob of heads: free, and without a fixed ratio."""
    rules = problem.rules
    free = [
        group
        for group in problem.groups
        if group.name in allocation.widths and rules[group.name].is_free and rules[group.name].fixed is None
    ]
    return problem.tie(free)


def resizable_groups(problem: AllocationProblem, allocation: Allocation) -> list[TiedGroups]:
    """Return the movable groups whose kind (channels or head dims) has a non-zero pruning ratio."""
    ratios = problem.ratios
    return [
        tied
        for tied in movable_groups(problem, allocation)
        if (ratios.head_dim_ratio if tied.first.num_heads else ratios.ratio) > 0
    ]


def _next_width(allowed: Sequence[int], width: int) -> int | None:
    """Return the next larger allowed width."""
    return next((wider for wider in allowed if wider > width), None)


def _narrow_to_fit(
    problem: AllocationProblem, allocation: Allocation, limit: BudgetLimit, tied: TiedGroups, allowed: Sequence[int]
) -> Trial:
    """Narrow tied groups to the largest lower width that meets the budget, or to the lowest."""

    def figure(width: int) -> float:
        return limit.measure(problem, allocation.resized(tied, width))

    lower = [width for width in allowed if width < allocation.widths[tied.name]]
    if not lower:
        return Trial(allocation, limit.measure(problem, allocation))
    if figure(lower[-1]) <= limit.target:  # most often one step is enough
        return Trial(allocation.resized(tied, lower[-1]), figure(lower[-1]))
    width = lower[max(0, bisect_right(lower, limit.target, key=figure) - 1)]
    return Trial(allocation.resized(tied, width), figure(width))
