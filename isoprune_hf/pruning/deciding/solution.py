"""The result of an allocator, and the protocol of allocators."""

from typing import NamedTuple, Protocol

from isoprune_hf.pruning.cost.macs import CostModel
from isoprune_hf.pruning.deciding.allocation import Allocation
from isoprune_hf.pruning.deciding.allocation_problem import AllocationProblem
from isoprune_hf.pruning.deciding.budget import BudgetLimit
from isoprune_hf.pruning.deciding.settings import Ratios


class Solution(NamedTuple):
    """The result of an allocator.

    Args:
        allocation: How much of every group is kept.
        ratios: The ratios that were applied, as the budget scaled them.
        notes: Lines for the user.
    """

    allocation: Allocation
    ratios: Ratios
    notes: tuple[str, ...]


class Allocator(Protocol):
    """A way to share a cut among groups; registered in `allocators.ALLOCATORS` under its recipe value."""

    def __call__(self, problem: AllocationProblem, limit: BudgetLimit | None, cost: CostModel | None) -> Solution:
        """Solve an allocation problem.

        Args:
            problem: Scores, floors, allowed widths and ratios.
            limit: The budget; None where only ratios are given.
            cost: Cost of every width.

        Raises:
            BudgetError: The floors are above the budget.
            RecipeError: The cost is missing and needed, or no ratio is above 0.
        """
        ...
