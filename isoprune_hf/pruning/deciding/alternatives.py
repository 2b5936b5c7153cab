"""Compare ways to decide: `make_alternatives` makes one plan for each from the same groups, scores and budget."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from isoprune_hf.errors import RecipeError
from isoprune_hf.pruning.cost.macs import CostModel
from isoprune_hf.pruning.deciding.make_plan import make_plan
from isoprune_hf.pruning.groups import CoupledGroup, ResidualBlock
from isoprune_hf.pruning.plan import PruningPlan
from isoprune_hf.pruning.scoring.scores import ImportanceScores
from isoprune_hf.recipes import PruneRecipe
from isoprune_hf.recipes.presets import LOSS_CRITERIA

# Name -> the settings that define an alternative. Tables, plots and the inspection page follow this order.
ALTERNATIVES: Mapping[str, Mapping[str, Any]] = {
    "local": {"allocation": "class", "scope": "local"},
    "global": {"allocation": "class", "scope": "global"},
    "isomorphic": {"allocation": "class", "scope": "isomorphic"},
    "knapsack": {"allocation": "knapsack", "selection": "exact", "normalizer": "none"},
}
DEFAULT_BUDGET = "50%"


def recipe_of_budget(recipe: PruneRecipe, target_macs: str | float | None, **settings: Any) -> PruneRecipe:
    """Return a copy of a recipe with a MACs budget and other settings; values filled in by its preset are kept.

    Raises:
        RecipeError: A value is out of its range.
    """
    return replace(recipe, preset=None, target_macs=target_macs, target_params=None, target_latency=None, **settings)


def check_comparable(recipe: PruneRecipe) -> None:
    """Check that a recipe has no budget other than MACs.

    Raises:
        RecipeError: It has another budget.
    """
    if recipe.budget is not None and recipe.budget.kind != "macs":
        raise RecipeError(
            f"plans are compared at equal MACs: set prune.target_macs, not prune.{recipe.budget.setting}"
        )


def make_alternatives(
    groups: Sequence[CoupledGroup],
    scores: ImportanceScores,
    recipe: PruneRecipe,
    *,
    cost: CostModel,
    blocks: Sequence[ResidualBlock] = (),
) -> dict[str, PruningPlan]:
    """Make a plan for each of the `ALTERNATIVES` at the MACs of a recipe; reads neither weights nor images.

    Args:
        groups: Groups of `trace_groups`.
        scores: Scores of these groups, shared by all alternatives.
        recipe: The `target_macs` and all other settings that the alternatives have in common.
        cost: Cost of every width, from `cost_model`.
        blocks: Residual blocks that the recipe may remove.

    Returns:
        Name -> plan, in the order of `ALTERNATIVES`; without the knapsack if scores are not losses, or if blocks are
        removed by ratio.

    Raises:
        BudgetError, RecipeError: See `make_plan`.
    """
    return {
        name: make_plan(
            groups,
            scores,
            recipe_of_budget(recipe, recipe.target_macs, **settings),
            cost=cost,
            blocks=blocks,
        )
        for name, settings in ALTERNATIVES.items()
        if settings["allocation"] == "class" or _fits_knapsack(scores, recipe)
    }


def _fits_knapsack(scores: ImportanceScores, recipe: PruneRecipe) -> bool:
    return scores.criterion in LOSS_CRITERIA and recipe.remove_blocks != "auto"
