"""The budget as a limit on an allocation; call `check_budget` before anything is scored."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from isoprune_hf.errors import BudgetError, RecipeError
from isoprune_hf.pruning.cost.latency import LatencyModel
from isoprune_hf.pruning.cost.macs import CostModel, RemovedUnits
from isoprune_hf.pruning.deciding.allocation import Allocation
from isoprune_hf.pruning.deciding.allocation_problem import AllocationProblem
from isoprune_hf.pruning.deciding.choose import allocate
from isoprune_hf.pruning.deciding.settings import WidthSettings
from isoprune_hf.pruning.groups import CoupledGroup, ResidualBlock
from isoprune_hf.recipes import Budget, PruneRecipe

# An allocation that leaves a larger share of its budget unused is improved by swaps, and reported if none helps.
UNUSED_SHARE_TOLERANCE = 0.005


@dataclass(frozen=True)
class BudgetLimit:
    """A budget that is resolved against a base: the one figure that an allocation must not exceed.

    Args:
        setting: Its recipe key: target_macs, target_params or target_latency.
        target: Largest allowed value: MACs, parameters, or milliseconds.
        base: The same figure of the base.
        figure: Computes the figure of the model that is left after a cut.
    """

    setting: str
    target: float
    base: float
    figure: Callable[[RemovedUnits], float]

    def measure(self, problem: AllocationProblem, allocation: Allocation) -> float:
        """Compute the figure of an allocation."""
        return self.figure(problem.removed_units(allocation))

    def format(self, value: float) -> str:
        """Format a value of this figure with its unit."""
        if self.setting == "target_latency":
            return f"{value:.4g} ms"
        return f"{value / 1e9:.4g} G" if self.setting == "target_macs" else f"{value / 1e6:.4g} M"


def budget_limit(budget: Budget, cost: CostModel | None, latency: LatencyModel | None) -> BudgetLimit:
    """Resolve a budget against the base of a cost model.

    Raises:
        RecipeError: The cost or latency model that the budget needs is missing.
        BudgetError: The budget is above the base.
    """
    if cost is None:
        raise RecipeError(
            f"prune.{budget.setting} needs the cost of `cost_model`: pass it to make_plan, or call prune_model"
        )
    limit = _limit_latency(budget, cost, latency) if budget.kind == "latency" else _limit_cost(budget, cost)
    if limit.target > limit.base:
        raise BudgetError(
            f"prune.{limit.setting} is {limit.format(limit.target)}, the base has only {limit.format(limit.base)}: "
            "nothing to cut"
        )
    return limit


def in_blocks(recipe: PruneRecipe, latency: LatencyModel | None) -> PruneRecipe:
    """Return a recipe whose widths, for a latency budget, are also multiples of the block that the kernels compute.

    A part of a block takes as long as the whole one, so that narrower widths would save nothing.
    """
    if latency is None or recipe.budget is None or recipe.budget.kind != "latency":
        return recipe
    return replace(recipe, round_to=math.lcm(recipe.round_to, latency.multiple))


def check_budget(
    groups: Sequence[CoupledGroup],
    recipe: PruneRecipe,
    cost: CostModel,
    latency: LatencyModel | None = None,
    blocks: Sequence[ResidualBlock] = (),
) -> None:
    """Check, before anything is scored, that a budget can be reached with some scores.

    Raises:
        BudgetError: It cannot; the message names the smallest figure that can.
        RecipeError: A pattern or block of the recipe does not exist in the model.
    """
    limit = None if recipe.budget is None else budget_limit(recipe.budget, cost, latency)
    problem = AllocationProblem.from_recipe(groups, None, in_blocks(recipe, latency), blocks)
    # With fixed fractions the smallest figure depends on the scores: those budgets are checked after scoring.
    if limit is None or recipe.ratios or recipe.remove_blocks is not None:
        return
    smallest = limit.measure(problem, allocate(problem, problem.ratios.deepest()))
    check_reachable(limit, smallest, problem.settings.widths)


def check_reachable(limit: BudgetLimit, smallest: float, widths: WidthSettings) -> None:
    """Check that the smallest possible figure is within the budget.

    Raises:
        BudgetError: It is not.
    """
    if smallest > limit.target:
        raise BudgetError(
            f"prune.{limit.setting} {limit.format(limit.target)} cannot be reached: the smallest is "
            f"{limit.format(smallest)} with min_keep {widths.min_keep}, max_ratio {widths.max_ratio} and round_to "
            f"{widths.round_to}"
        )


def budget_note(problem: AllocationProblem, allocation: Allocation, limit: BudgetLimit) -> tuple[str, ...]:
    """Return a note for the user if an allocation leaves more than 0.5 % of its budget unused."""
    reached = limit.measure(problem, allocation)
    if reached >= (1 - UNUSED_SHARE_TOLERANCE) * limit.target:
        return ()
    widths = problem.settings.widths
    return (
        f"prune.{limit.setting} {limit.format(limit.target)}: {limit.format(reached)} is reached, "
        f"{100 * reached / limit.target:.1f} % of it; no allowed width comes closer (round_to {widths.round_to}, "
        f"min_keep {widths.min_keep})",
    )


def _limit_latency(budget: Budget, cost: CostModel, latency: LatencyModel | None) -> BudgetLimit:
    if latency is None:
        raise RecipeError(
            f"prune.{budget.setting} needs the latency of `fit_latency`: pass it to make_plan, or call prune_model"
        )
    base = latency.predict_cut(cost)
    return BudgetLimit(budget.setting, budget.resolve(base), base, lambda removed: latency.predict_cut(cost, removed))


def _limit_cost(budget: Budget, cost: CostModel) -> BudgetLimit:
    if budget.kind == "macs":
        target = budget.resolve(cost.base.macs)
        return BudgetLimit(budget.setting, target, cost.base.macs, lambda removed: cost.cost(*removed).macs)
    target = budget.resolve(cost.base.params)
    return BudgetLimit(budget.setting, target, cost.base.params, lambda removed: cost.cost(*removed).params)
