"""The decision: a plan that says what stays, made from scores and ratios or from a budget."""

from collections.abc import Iterable, Sequence
from dataclasses import asdict, replace

from isoprune_hf.errors import RecipeError
from isoprune_hf.pruning.cost.latency import LatencyModel
from isoprune_hf.pruning.cost.macs import CostModel
from isoprune_hf.pruning.deciding.budget import BudgetLimit, read_budget, solve
from isoprune_hf.pruning.deciding.knapsack import solve_knapsack
from isoprune_hf.pruning.deciding.ranking import Choice, Ranking, Ratios
from isoprune_hf.pruning.deciding.rounding import width_step
from isoprune_hf.pruning.groups import CoupledGroup, ResidualBlock
from isoprune_hf.pruning.plan import PruningPlan
from isoprune_hf.pruning.scoring.scores import ImportanceScores
from isoprune_hf.recipes import BUDGETS, PruneRecipe

# Settings that change a decision; the ratios are recorded as the budget has scaled them.
_SETTINGS = (
    *(
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
    ),
    *("exclude", "head_dims", "remove_blocks", *BUDGETS, "selection", "min_keep", "max_ratio", "round_to", "rounding"),
    *("rotate", "reconstruct", "steps", "layout"),
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
    """Decide what leaves; touches no weights and needs no data.

    By `allocation`: class lets every class give up the same fraction of its channels, its lowest-scored ones. With a
    budget the ratios are scaled together by bisection until the figure meets it from below; what is left of it goes
    back to the best of the removed channels. knapsack lets all classes compete by loss per saved figure; the ratios
    then say which kinds may be cut, and without a budget how many MACs stay.

    Args:
        groups: Groups of `trace_groups`.
        scores: Scores of these groups, and of `blocks` where some may leave.
        recipe: Scope, ratios or budget, floors and rounding.
        cost: Cost of every width, of `cost_model`; needed for a budget, and for the achieved cost in the plan.
        latency: Time of every width, of `fit_latency`; needed for a latency budget.
        blocks: Residual blocks, of `find_blocks`; needed to remove some.

    Raises:
        BudgetError: The budget is below what the floors allow, or above the base.
        RecipeError: The scores are not of these groups, or the recipe names what does not exist.
    """
    check_scores(groups, scores)
    recipe = recipe_of_scores(recipe, scores)
    ranking = Ranking(groups, scores, recipe, blocks)
    ratios, notes = Ratios.of(recipe), ()
    budget = read_budget(recipe, cost, latency)
    if recipe.allocation == "knapsack":
        choice, notes = solve_knapsack(ranking, ratios, budget or _same_macs(ranking, ratios, cost))
    elif budget is None:
        choice = ranking.choose(ratios)
    else:
        choice, ratios, notes = solve(ranking, ratios, budget)
    kept = {group.name: ranking.keep(group, choice) for group in groups if group.name in choice.widths}
    cut = [group for group in groups if len(kept.get(group.name, ())) not in (0, group.channels)]
    settings = {
        "criterion": scores.criterion,
        "sample": {key: value for key, value in scores.sample.items() if isinstance(value, str | int)},
        "preset": recipe.taken_preset,
        **{name: getattr(recipe, name) for name in _SETTINGS},
        **asdict(ratios),
    }
    return PruningPlan(
        kept={group.name: kept[group.name] for group in cut},
        heads={group.name: choice.heads[group.name] for group in cut if group.num_heads},
        removed_blocks=choice.removed_blocks,
        margins=choice.margins,
        notes=(*notes, *_unaligned(ranking, choice), *_spared(choice)),
        achieved={} if cost is None else {"base": cost.base.to_dict(), "pruned": ranking.cost(choice, cost).to_dict()},
        settings=settings,
        fingerprint=scores.fingerprint,
    )


def _same_macs(ranking: Ranking, ratios: Ratios, cost: CostModel | None) -> BudgetLimit:
    """The MACs that the ratios would leave if every class gave up the same fraction."""
    if cost is None:
        raise RecipeError("prune.allocation knapsack needs the cost of `cost_model`: give it to make_plan")
    target = ranking.cost(ranking.choose(ratios), cost).macs
    return BudgetLimit("ratio", target, cost.base.macs, lambda chosen, choice: chosen.cost(choice, cost).macs)


def removed_by(
    plan: PruningPlan, groups: Sequence[CoupledGroup]
) -> tuple[dict[str, int], dict[str, int], tuple[str, ...]]:
    """What a plan removes, as a cost model asks for it: group -> channels, attention group -> heads, blocks."""
    channels = {group.name: group.channels - len(plan.kept.get(group.name, range(group.channels))) for group in groups}
    heads = {group.name: group.num_heads - len(plan.heads.get(group.name, range(group.num_heads))) for group in groups}
    return channels, heads, plan.removed_blocks


def _unaligned(ranking: Ranking, choice: Choice) -> Iterable[str]:
    """Lines for the widths that are no multiple of `round_to`."""
    round_to = ranking.recipe.round_to
    for group in ranking.groups:
        width, step = choice.widths.get(group.name, 0), width_step(group, round_to)
        if width % step:
            unit = "dims in each head" if group.num_heads else "channels"
            size = group.head_dim or group.channels
            why = (
                f"which is narrower than round_to {round_to}" if size < step else f"no multiple of round_to {round_to}"
            )
            yield f"{group.name} keeps all of its {size} {unit}, {why}"


def _spared(choice: Choice) -> Iterable[str]:
    """Lines for the groups that a threshold alone would have emptied."""
    for name in choice.spared:
        yield f"{name} is below the threshold whole and keeps its best; torch-pruning 1.6.1 would not cut it at all"


def recipe_of_scores(recipe: PruneRecipe, scores: ImportanceScores) -> PruneRecipe:
    """Give the recipe that these scores are cut by.

    A preset that is named takes its own scores alone. Where `best` was taken without being named, scores of another
    criterion are cut as if the recipe had named that criterion.

    Raises:
        RecipeError: The preset of the recipe takes other scores.
    """
    if recipe.preset is not None:
        made = {name: getattr(scores, name) for name in ("criterion", "reduction", "score_batchnorm")}
        wrong = [name for name, value in made.items() if value != getattr(recipe, name)]
        if wrong:
            raise RecipeError(
                f"prune.preset {recipe.preset} takes {wrong[0]} {getattr(recipe, wrong[0])}, and the scores were made "
                f"with {made[wrong[0]]}: score anew, or name --prune.criterion {scores.criterion}"
            )
    elif recipe.taken_preset is not None and scores.criterion != recipe.criterion:
        return replace(recipe, criterion=scores.criterion, allocation=None, rotate=None, reconstruct=None)
    return recipe


def check_scores(groups: Sequence[CoupledGroup], scores: ImportanceScores) -> None:
    """Check that scores belong to these groups.

    Raises:
        RecipeError: They do not.
    """
    if not groups:
        raise RecipeError("no channels that could leave were found in this model")
    for group in groups:
        if group.name not in scores.scores or len(scores.scores[group.name]) != group.channels:
            raise RecipeError(
                f"the scores are of another model: they do not fit the {group.channels} channels of {group.name}"
            )
