"""Make a pruning plan from scores and ratios, or from scores and a budget: call `make_plan`."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

from isoprune_hf.errors import RecipeError
from isoprune_hf.pruning.cost.latency import LatencyModel
from isoprune_hf.pruning.cost.macs import CostModel
from isoprune_hf.pruning.deciding.allocation import Allocation
from isoprune_hf.pruning.deciding.allocation_problem import AllocationProblem
from isoprune_hf.pruning.deciding.allocators import ALLOCATORS
from isoprune_hf.pruning.deciding.budget import budget_limit, in_blocks
from isoprune_hf.pruning.deciding.rounding import width_step
from isoprune_hf.pruning.deciding.settings import Ratios
from isoprune_hf.pruning.groups import CoupledGroup, ResidualBlock
from isoprune_hf.pruning.plan import PruningPlan, note_left
from isoprune_hf.pruning.scoring.scores import ImportanceScores
from isoprune_hf.recipes import PruneRecipe

# Settings that change a decision, as a plan records them; the ratios are recorded as the budget has scaled them.
_RECORDED_SETTINGS = (
    "score_batchnorm",
    "reduction",
    "normalizer",
    "allocation",
    "scope",
    "scopes",
    "signature",
    "engine",
    "ratios",
    "include",
    "exclude",
    "head_dims",
    "remove_blocks",
    "target_macs",
    "target_params",
    "target_latency",
    "selection",
    "min_keep",
    "max_ratio",
    "round_to",
    "rounding",
    "rotate",
    "reconstruct",
    "steps",
    "layout",
)


def make_plan(
    groups: Sequence[CoupledGroup],
    scores: ImportanceScores,
    recipe: PruneRecipe,
    *,
    cost: CostModel | None = None,
    latency: LatencyModel | None = None,
    blocks: Sequence[ResidualBlock] = (),
) -> PruningPlan:
    """Decide what to remove; reads neither weights nor images.

    With `allocation` class every isomorphic class gives up the same fraction of its channels, lowest scores first. For
    a budget the ratios are scaled together by bisection until the figure is below it, and the remainder is given back
    to the best removed channels. With knapsack all classes compete by loss per saved figure; the ratios then select
    the kinds that may be cut and, without a budget, how many MACs are kept.

    Args:
        groups: Groups of `trace_groups`.
        scores: Scores of these groups, and of `blocks` where some may be removed.
        recipe: Scope, ratios or budget, floors and rounding.
        cost: Cost of every width, from `cost_model`; needed for a budget, and for the achieved cost in the plan.
        latency: Time of every width, from `fit_latency`; needed for a latency budget.
        blocks: Residual blocks, from `find_blocks`; needed to remove some.

    Raises:
        BudgetError: The budget is below what the floors allow, or above the base.
        RecipeError: The scores are not of these groups, or the recipe names groups or blocks that do not exist.
    """
    check_scores(groups, scores)
    asked = recipe_of_scores(recipe, scores).settled(has_images=False)
    recipe = in_blocks(asked, latency)
    problem = AllocationProblem.from_recipe(groups, scores, recipe, blocks)
    limit = None if recipe.budget is None else budget_limit(recipe.budget, cost, latency)
    allocation, ratios, notes = ALLOCATORS[recipe.allocation or "class"](problem, limit, cost)
    kept = {
        group.name: problem.kept_channels(group, allocation) for group in groups if group.name in allocation.widths
    }
    cut = [group for group in groups if len(kept.get(group.name, ())) not in (0, group.channels)]
    achieved = {}
    if cost is not None:
        pruned_cost = cost.cost(*problem.removed_units(allocation))
        achieved = {"base": cost.base.to_dict(), "pruned": pruned_cost.to_dict()}
    return PruningPlan(
        kept={group.name: kept[group.name] for group in cut},
        heads={group.name: allocation.heads[group.name] for group in cut if group.num_heads},
        removed_blocks=allocation.removed_blocks,
        margins=allocation.margins,
        notes=(
            *_note_unscored("group", groups, scores.scores, scores),
            *_note_unscored("block", blocks, scores.blocks, scores),
            *_note_no_blocks(recipe, blocks),
            *notes,
            *_note_blocks(asked, recipe),
            *_note_unaligned_widths(problem, allocation),
            *_note_spared_groups(allocation),
        ),
        achieved=achieved,
        settings=_record_settings(recipe, scores, ratios),
        fingerprint=scores.fingerprint,
    )


def _record_settings(recipe: PruneRecipe, scores: ImportanceScores, ratios: Ratios) -> dict[str, Any]:
    """Return the settings of a plan, with the ratios as the budget has scaled them."""
    return {
        "criterion": scores.criterion,
        "sample": {key: value for key, value in scores.sample.items() if isinstance(value, str | int)},
        "preset": recipe.taken_preset,
        **{name: getattr(recipe, name) for name in _RECORDED_SETTINGS},
        **asdict(ratios),
    }


def recipe_of_scores(recipe: PruneRecipe, scores: ImportanceScores) -> PruneRecipe:
    """Return the recipe that applies to scores.

    A named preset accepts its own scores only. Any other recipe gets the criterion of the scores, and heads that are
    rotated as they were unless it names `rotate`.

    Raises:
        RecipeError: The preset of the recipe needs other scores.
    """
    if recipe.preset is not None:
        made = {name: getattr(scores, name) for name in ("criterion", "reduction", "score_batchnorm")}
        wrong = [name for name, value in made.items() if value != getattr(recipe, name)]
        if wrong:
            raise RecipeError(
                f"prune.preset {recipe.preset} takes {wrong[0]} {getattr(recipe, wrong[0])}, and the scores were made "
                f"with {made[wrong[0]]}: score again, or replace the preset by --prune.criterion {scores.criterion}"
            )
        return recipe
    return replace(
        recipe, criterion=scores.criterion, rotate=scores.rotated if recipe.rotate is None else recipe.rotate
    )


def check_scores(groups: Sequence[CoupledGroup], scores: ImportanceScores) -> None:
    """Check that there are groups, and that scores belong to them; groups that were not scored are left whole.

    Raises:
        RecipeError: There are none, or they do not.
    """
    if not groups:
        raise RecipeError("found no prunable channels in this model")
    missing = [group for group in groups if group.name not in scores.scores]
    known = len(groups) - len(missing)
    is_other = bool(missing) and (known == 0 or known < len(scores.scores))
    for group in groups:
        size = group.channels if group in missing else len(scores.scores[group.name])
        if size != group.channels or (is_other and group in missing):
            raise RecipeError(
                f"the scores are of another model: they do not fit the {group.channels} channels of {group.name}"
            )


def _note_unscored(
    unit: str,
    units: Sequence[CoupledGroup] | Sequence[ResidualBlock],
    scored: Mapping[str, object],
    scores: ImportanceScores,
) -> tuple[str, ...]:
    """Return the note on groups or blocks without scores."""
    reasons: dict[str, list[str]] = {}
    for name in (entry.name for entry in units if entry.name not in scored):
        reason = f"{scores.criterion} finds no {scores.unscored.get(name, 'value to score')}"
        reasons.setdefault(reason, []).append(name)
    return note_left("left whole", unit, reasons)


def _note_no_blocks(recipe: PruneRecipe, blocks: Sequence[ResidualBlock]) -> Iterator[str]:
    """Yield a line if blocks are to be removed by ratio and there are none."""
    if recipe.remove_blocks == "auto" and not blocks:
        yield "prune.remove_blocks auto removes nothing: the model has no removable residual blocks"


def _note_blocks(asked: PruneRecipe, recipe: PruneRecipe) -> Iterator[str]:
    """Yield a line if a latency budget needs multiples of a larger number than the recipe asks for."""
    if recipe.round_to != asked.round_to:
        yield (
            f"widths are multiples of {recipe.round_to}, not only of round_to {asked.round_to}: between them, "
            f"{asked.latency_backend} takes as long on this machine as for the next larger one"
        )


def _note_unaligned_widths(problem: AllocationProblem, allocation: Allocation) -> Iterator[str]:
    """Yield a line for each width that is not a multiple of `round_to`."""
    round_to = problem.settings.widths.round_to
    for group in problem.groups:
        step = width_step(group, round_to)
        if allocation.widths.get(group.name, 0) % step:
            unit = "dims in each head" if group.num_heads else "channels"
            size = group.head_dim or group.channels
            reason = "which is narrower than" if size < step else "no multiple of"
            yield f"{group.name} keeps all of its {size} {unit}, {reason} round_to {round_to}"


def _note_spared_groups(allocation: Allocation) -> Iterator[str]:
    """Yield a line for each group that a threshold would have emptied."""
    for name in allocation.spared:
        yield f"{name} is below the threshold whole and keeps its best; torch-pruning 1.6.1 would not cut it at all"
