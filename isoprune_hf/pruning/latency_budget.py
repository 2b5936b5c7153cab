"""Meet a latency budget: `fit_base` predicts the time of any cut, `meet_latency` measures the cuts it tries."""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import NamedTuple

from isoprune_hf.checkpoint.modeling_isoprune import IsoPruneForImageClassification
from isoprune_hf.checkpoint.structure import image_size_of
from isoprune_hf.errors import BudgetError, RecipeError
from isoprune_hf.measuring.cases import describe_machine
from isoprune_hf.measuring.speed import record_measurement, runtime_of
from isoprune_hf.pruning.cost.latency import FITTED_PASSES, LatencyModel, LatencySettings, fit_latency
from isoprune_hf.pruning.cost.latency_cache import remembered
from isoprune_hf.pruning.cost.macs import CostModel, RemovedUnits
from isoprune_hf.pruning.cutting.cut import apply_plan
from isoprune_hf.pruning.deciding.make_plan import make_plan
from isoprune_hf.pruning.groups import CoupledGroup
from isoprune_hf.pruning.plan import PruningPlan
from isoprune_hf.pruning.scoring.score_groups import score_groups
from isoprune_hf.recipes import PruneRecipe
from isoprune_hf.version import __version__

Cut = tuple[PruningPlan, IsoPruneForImageClassification]


class MeasuredPair(NamedTuple):
    """Milliseconds of a base and a cut model, and why the machine counts as busy; None if it does not."""

    base: float
    pruned: float
    busy: str | None = None


_FITTED_RATIOS = (0.25, 0.5, 0.75)
_WIDTHS = 8
_BLOCKS = (16, 32)  # channels that kernels may compute together, other than 8
_PROBE_RATIO = 0.5
_MAX_CUTS = 6
# A cut that uses a smaller share of its budget is followed by one that aims higher.
_MIN_USED_SHARE = 0.93
_AIM_MARGIN = 0.98


def latency_settings(recipe: PruneRecipe) -> LatencySettings:
    """Return the conditions under which a recipe times models."""
    return LatencySettings(recipe.latency_batch_size, runtime_of(recipe.latency_backend, recipe.latency_precision))


def fit_base(
    model: IsoPruneForImageClassification,
    groups: Sequence[CoupledGroup],
    cost: CostModel,
    settings: LatencySettings,
    *,
    round_to: int,
) -> LatencyModel:
    """Measure the base and three cuts of it by random scores, and fit a time to each layer.

    The widths of these cuts are multiples of 16, which suit most kernels. A fourth cut, whose widths are multiples of
    8 (and of `round_to`), shows whether kernels compute 16 or 32 channels at once. The times depend on the
    architecture and the machine alone, so they are kept for the next run; see `remembered`.

    Args:
        model: The base; left untouched.
        groups: Groups of `trace_groups(model)`.
        cost: Cost of this base.
        settings: Conditions of the measurement.
        round_to: Widths of all cuts are multiples of this number, too.
    """
    layer_macs = cost.layer_macs({}, {})
    record = record_measurement(model.device, settings.runtime, batch_size=settings.batch_size, repeats=FITTED_PASSES)
    conditions = {
        "machine": describe_machine(model.device),
        "measurement": record,
        "package": __version__,
        "network": repr(model.model),
        "image_size": list(image_size_of(model)),
        "dtype": str(model.dtype),
        "layer_macs": layer_macs,
        "cuts": [*_FITTED_RATIOS, _PROBE_RATIO, round_to],
        "blocks": list(_BLOCKS),
    }
    return remembered(conditions, layer_macs, record, lambda: _fit(model, groups, cost, settings, round_to=round_to))


def _fit(
    model: IsoPruneForImageClassification,
    groups: Sequence[CoupledGroup],
    cost: CostModel,
    settings: LatencySettings,
    *,
    round_to: int,
) -> LatencyModel:
    scores = score_groups(model, groups, criterion="random")

    def cut(ratio: float, multiple: int) -> RemovedUnits:
        plan = make_plan(
            groups,
            scores,
            PruneRecipe(criterion="random", allocation="class", scope="local", ratio=ratio, round_to=multiple),
        )
        models.append(apply_plan(model, plan, groups))
        return RemovedUnits.of_plan(plan, groups)

    models = [model]
    aligned = math.lcm(round_to, _BLOCKS[0])
    removed = [RemovedUnits({}, {}, ()), *(cut(ratio, aligned) for ratio in _FITTED_RATIOS)]
    step = math.lcm(round_to, _WIDTHS)
    multiples = [1, *(block for block in _BLOCKS if block > step and block % step == 0)]
    if len(multiples) > 1:
        removed.append(cut(_PROBE_RATIO, step))
    macs = {multiple: [cost.layer_macs(*units, multiple=multiple) for units in removed] for multiple in multiples}
    variants = list(zip(models, macs[1], strict=True))
    return fit_latency(model, variants, settings, fitted=1 + len(_FITTED_RATIOS), blocked=macs)


def meet_latency(
    recipe: PruneRecipe,
    cost: CostModel,
    latency: LatencyModel,
    *,
    attempt: Callable[[PruneRecipe], Cut],
    measure: Callable[[IsoPruneForImageClassification], MeasuredPair],
) -> Cut:
    """Cut and measure until the measured time meets the budget.

    A share of the base refers to the time of the base as measured in turns with the cut, since machines drift.

    Args:
        recipe: Recipe with a `target_latency`.
        cost: Cost of the base.
        latency: Latency model of the base.
        attempt: Makes plan and model for a recipe.
        measure: Measures base and cut model, in turns; returns the times of the main process on every rank.

    Returns:
        The plan and the model that use most of the budget, of those whose measured time is within it.

    Raises:
        RecipeError: The recipe has no latency budget.
        BudgetError: No measured cut was fast enough.
    """
    budget = recipe.budget
    if budget is None or budget.kind != "latency":
        raise RecipeError("prune.target_latency is not set")
    predicted = latency.predict_cut(cost)
    aim = budget.resolve(predicted)
    best: Cut | None = None
    best_share = 0.0
    smallest_share = float("inf")
    reached: float | None = None  # the last aim that a cut could be made for
    for _ in range(_MAX_CUTS):
        try:
            plan, pruned = attempt(replace(recipe, target_latency=aim))
        except BudgetError:
            if reached is None:
                raise
            aim = (reached + aim) / 2
            continue
        reached = aim
        times = measure(pruned)
        share = times.pruned / budget.resolve(times.base)
        smallest_share = min(smallest_share, share)
        if best_share < share <= 1:
            best_share = share
            best = _record_times(plan, recipe, latency, times), pruned
        if _MIN_USED_SHARE <= share <= 1:
            break
        aim = min(aim * _AIM_MARGIN / share, predicted)
    if best is None:
        raise BudgetError(
            f"prune.target_latency {recipe.target_latency} was not met when measured: the best of {_MAX_CUTS} cuts "
            f"took {100 * smallest_share:.0f} % of it; allow more time, or measure on an otherwise idle machine"
        )
    return best


def _record_times(
    plan: PruningPlan, recipe: PruneRecipe, latency: LatencyModel, measured: MeasuredPair
) -> PruningPlan:
    """Return the plan with the measured times, and with the budget of the recipe in place of the aim."""
    times = {"base": measured.base, "pruned": measured.pruned}
    achieved = {name: {**figures, "latency_ms": round(times[name], 3)} for name, figures in plan.achieved.items()}
    settings = {**plan.settings, "target_latency": recipe.target_latency, "latency": dict(latency.record)}
    busy = f"the latency is estimated from CPU time on a busy machine ({measured.busy}): measure it with benchmark"
    notes = plan.notes if measured.busy is None else (*plan.notes, busy)
    return replace(plan, achieved=achieved, settings=settings, notes=notes)
