"""A latency budget: fitted on a few cuts of this base, and met by measuring what was cut."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from isoprune_hf.checkpoint.modeling_isoprune import IsoPruneForImageClassification
from isoprune_hf.errors import BudgetError, RecipeError
from isoprune_hf.measuring.speed import measure_pair
from isoprune_hf.pruning.cost.latency import LatencyModel, LatencySettings, fit_latency
from isoprune_hf.pruning.cost.macs import CostModel, RemovedUnits
from isoprune_hf.pruning.cutting.cut import apply_plan
from isoprune_hf.pruning.deciding.make_plan import make_plan
from isoprune_hf.pruning.groups import CoupledGroup
from isoprune_hf.pruning.plan import PruningPlan
from isoprune_hf.pruning.scoring.scores import score_groups
from isoprune_hf.recipes import PruneRecipe

_FITTED_RATIOS = (0.25, 0.5, 0.75)
_MOST_CUTS = 6
# A cut that takes less of its budget than this is tried again with a larger aim.
_CLOSE, _MARGIN = 0.93, 0.98


def latency_settings(recipe: PruneRecipe) -> LatencySettings:
    """Return the conditions under which a recipe times models."""
    return LatencySettings(recipe.latency_batch_size, recipe.latency_precision, recipe.latency_backend)


def fit_base(
    model: IsoPruneForImageClassification,
    groups: Sequence[CoupledGroup],
    cost: CostModel,
    settings: LatencySettings,
    *,
    round_to: int,
) -> LatencyModel:
    """Measure the base and three cuts of it by random scores, and fit a time to each layer.

    Args:
        model: The base; left untouched.
        groups: Groups of `trace_groups(model)`.
        cost: Cost of this base.
        settings: Conditions of the measurement.
        round_to: Widths of the cuts are multiples of this number.
    """
    scores = score_groups(model, groups, criterion="random")
    variants = [(model, cost.layer_macs({}, {}))]
    for ratio in _FITTED_RATIOS:
        plan = make_plan(
            groups, scores, PruneRecipe(criterion="random", scope="local", ratio=ratio, round_to=round_to)
        )
        variants.append((apply_plan(model, plan, groups), cost.layer_macs(*RemovedUnits.of_plan(plan, groups))))
    return fit_latency(model, variants, settings)


def meet_latency(
    model: IsoPruneForImageClassification,
    recipe: PruneRecipe,
    cost: CostModel,
    latency: LatencyModel,
    *,
    decide: Callable[[PruneRecipe], PruningPlan],
    cut: Callable[[PruningPlan], IsoPruneForImageClassification],
    agree: Callable[[Any], Any],
) -> tuple[PruningPlan, IsoPruneForImageClassification]:
    """Decide, cut and measure until the measured time meets the budget.

    A share of the base is one of the base's time as it is measured in turns with the cut: machines drift.

    Args:
        model: The base.
        recipe: Holds `target_latency`.
        cost: Cost of this base.
        latency: Fitted on this base.
        decide: Makes the plan of a recipe.
        cut: Makes the model of a plan.
        agree: Gives every rank what the main process measured.

    Returns:
        The slowest plan and model found whose measured time is at most the target.

    Raises:
        BudgetError: No cut was fast enough when measured.
    """
    options = {
        "batch_size": recipe.latency_batch_size,
        "precision": recipe.latency_precision,
        "backend": recipe.latency_backend,
    }
    if recipe.budget is None:
        raise RecipeError("prune.target_latency is not set")
    budget, predicted = recipe.budget, latency.predict(cost.layer_macs({}, {}))
    aim = budget.resolve(predicted)
    best, closest, lowest = None, float("inf"), 0.0
    for _ in range(_MOST_CUTS):
        plan = decide(replace(recipe, target_latency=aim))
        pruned = cut(plan)
        base_ms, pruned_ms = agree(measure_pair(model, pruned, **options))
        target = budget.resolve(base_ms)
        share = pruned_ms / target
        closest = min(closest, share)
        if lowest < share <= 1:
            lowest, best = share, (_record(plan, recipe, latency, base_ms, pruned_ms), pruned)
        if _CLOSE <= share <= 1:
            break
        aim = min(aim * _MARGIN / share, predicted)
    if best is None:
        raise BudgetError(
            f"prune.target_latency {recipe.target_latency} was not met when measured: the best of {_MOST_CUTS} cuts "
            f"took {100 * closest:.0f} % of it; give more time, or measure on a machine that does nothing else"
        )
    return best


def _record(
    plan: PruningPlan, recipe: PruneRecipe, latency: LatencyModel, base_ms: float, pruned_ms: float
) -> PruningPlan:
    times = {"base": base_ms, "pruned": pruned_ms}
    achieved = {name: {**figures, "latency_ms": round(times[name], 3)} for name, figures in plan.achieved.items()}
    settings = {**plan.settings, "target_latency": recipe.target_latency, "latency": dict(latency.record)}
    return replace(plan, achieved=achieved, settings=settings)
