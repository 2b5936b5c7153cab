"""What can be compared: ways to decide, each a plan from the same groups, scores and budget."""

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
from isoprune_hf.recipes.prune import LOSS_CRITERIA

# The one list of what is compared: name -> the settings that make it. Tables, plots and the page follow it.
ALTERNATIVES: Mapping[str, Mapping[str, Any]] = {
    "local": {"allocation": "class", "scope": "local"},
    "global": {"allocation": "class", "scope": "global"},
    "isomorphic": {"allocation": "class", "scope": "isomorphic"},
    "knapsack": {"allocation": "knapsack", "selection": "exact", "normalizer": "none"},
}
DEFAULT_BUDGET = "50%"


def recipe_of_budget(recipe: PruneRecipe, target_macs: str | float, **settings: Any) -> PruneRecipe:
    """Give a recipe a budget of MACs in place of its own, and other settings; those that its preset took stay.

    Raises:
        RecipeError: A value is out of its range.
    """
    budget = {"target_macs": target_macs, "target_params": None, "target_latency": None}
    return replace(recipe, preset=None, **budget, **settings)


def check_comparable(recipe: PruneRecipe) -> None:
    """Check that a recipe leaves the budget to MACs.

    Raises:
        RecipeError: It has another budget.
    """
    for name in ("target_params", "target_latency"):
        if getattr(recipe, name) is not None:
            raise RecipeError(f"what is compared is compared at equal MACs: give prune.target_macs, not prune.{name}")


def make_alternatives(
    groups: Sequence[CoupledGroup],
    scores: ImportanceScores,
    recipe: PruneRecipe,
    *,
    cost: CostModel,
    blocks: Sequence[ResidualBlock] = (),
) -> dict[str, PruningPlan]:
    """Decide by every one of the `ALTERNATIVES` at the MACs of the recipe; touches no weights and needs no data.

    Args:
        groups: Groups of `trace_groups`.
        scores: Scores of these groups, made once.
        recipe: Holds `target_macs` and everything that the alternatives have in common.
        cost: Cost of every width, of `cost_model`.
        blocks: Residual blocks that the recipe may remove.

    Returns:
        Name -> plan, in the order of `ALTERNATIVES`; without the knapsack where scores are no losses, or where blocks
        leave by a ratio.

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
        if settings["allocation"] == "class" or _has_losses(scores, recipe)
    }


def _has_losses(scores: ImportanceScores, recipe: PruneRecipe) -> bool:
    return scores.criterion in LOSS_CRITERIA and recipe.remove_blocks != "auto"
