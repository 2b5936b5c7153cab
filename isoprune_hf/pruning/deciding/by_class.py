"""Allocation `class`: every isomorphic class gives up the same fraction of its channels."""

import numpy as np

from isoprune_hf.errors import RecipeError
from isoprune_hf.pruning.cost.macs import CostModel
from isoprune_hf.pruning.deciding.allocation import Allocation, TiedGroups
from isoprune_hf.pruning.deciding.allocation_problem import AllocationProblem
from isoprune_hf.pruning.deciding.budget import BudgetLimit, budget_note, check_reachable
from isoprune_hf.pruning.deciding.choose import allocate
from isoprune_hf.pruning.deciding.refill import Gain, movable_groups, refill, swap_widths
from isoprune_hf.pruning.deciding.solution import Solution

_RATIO_TOLERANCE = 1e-6


def allocate_by_class(problem: AllocationProblem, limit: BudgetLimit | None, cost: CostModel | None) -> Solution:
    """Allocate by the ratios of the problem, scaled together if there is a budget; see `Allocator`."""
    if limit is None:
        return Solution(allocate(problem, problem.ratios), problem.ratios, ())
    return solve_budget(problem, limit)


def solve_budget(problem: AllocationProblem, limit: BudgetLimit) -> Solution:
    """Scale the ratios together by bisection until the figure is at most the target, then use up the remainder.

    Returns:
        The allocation, the scaled ratios, and a note if more than 0.5 % of the budget is unused.

    Raises:
        BudgetError: The floors are above the budget.
        RecipeError: All ratios are 0.
    """
    ratios = problem.ratios
    if ratios.largest == 0:
        raise RecipeError(f"prune.{limit.setting} needs at least one ratio above 0 to share the cut")

    def figure(share: float) -> float:
        return limit.measure(problem, allocate(problem, ratios.scaled(share)))

    check_reachable(limit, figure(1.0), problem.settings.widths)
    low = 0.0
    high = 0.0 if figure(0.0) <= limit.target else 1.0
    while high - low > _RATIO_TOLERANCE:
        middle = (low + high) / 2
        if figure(middle) > limit.target:
            low = middle
        else:
            high = middle
    scaled = ratios.scaled(high)
    allocation = allocate(problem, scaled)
    allocation = refill(problem, allocation, limit, _relative_score(problem, allocation))
    allocation = swap_widths(problem, allocation, limit)
    return Solution(allocation, scaled, budget_note(problem, allocation, limit))


def _relative_score(problem: AllocationProblem, allocation: Allocation) -> Gain:
    """Return the mean score of the regained units relative to the mean of their scope.

    Scores of different classes have different scales.
    """
    movable = movable_groups(problem, allocation)
    units = {tied.name: problem.sorted_units(tied, allocation.heads)[::-1] for tied in movable}
    by_scope: dict[str, list[np.ndarray]] = {}
    for tied in movable:
        by_scope.setdefault(problem.rules[tied.name].scope, []).append(units[tied.name])
    means = {scope: float(np.concatenate(values).mean()) or 1.0 for scope, values in by_scope.items()}

    def gain(_: Allocation, tied: TiedGroups, width: int, wider: int) -> float:
        return float(units[tied.name][width:wider].mean() / means[problem.rules[tied.name].scope])

    return gain
