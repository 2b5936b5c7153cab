"""Meeting a budget: ratios are scaled together until the figure fits, and what is left of it goes back."""

import heapq
from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from isoprune_hf.errors import BudgetError, RecipeError
from isoprune_hf.pruning.cost.latency import LatencyModel
from isoprune_hf.pruning.cost.macs import CostModel
from isoprune_hf.pruning.deciding.ranking import Choice, Ranking, Ratios, Team
from isoprune_hf.pruning.groups import CoupledGroup, ResidualBlock
from isoprune_hf.recipes import PruneRecipe

# What a group is worth that goes from one width to a larger one.
Worth = Callable[[Choice, Team, int, int], float]
# A result this far below its budget is searched for a better one, and reported when there is none.
_TOLERANCE = 0.005
_MOST_SWAPS = 4000


@dataclass(frozen=True)
class BudgetLimit:
    """The one figure that must not be exceeded.

    Args:
        setting: Its setting: target_macs, target_params or target_latency.
        target: Its largest value: MACs, parameters, or milliseconds.
        base: The figure of the base.
        measure: The figure of a choice.
    """

    setting: str
    target: float
    base: float
    measure: Callable[[Ranking, Choice], float]

    def show(self, value: float) -> str:
        """Write a value of this figure for people."""
        if self.setting == "target_latency":
            return f"{value:.4g} ms"
        return f"{value / 1e9:.4g} G" if self.setting == "target_macs" else f"{value / 1e6:.4g} M"


def read_budget(recipe: PruneRecipe, cost: CostModel | None, latency: LatencyModel | None) -> BudgetLimit | None:
    """Read the budget of a recipe; None where it has only ratios.

    Raises:
        RecipeError: The recipe has a budget and the cost or latency model is missing.
        BudgetError: The budget is more than the base needs.
    """
    wanted = recipe.budget
    if wanted is None:
        return None
    if cost is None:
        raise RecipeError(
            f"prune.{wanted.setting} needs the cost of `cost_model`: give it to make_plan, or call prune_model"
        )
    if wanted.kind == "latency":
        if latency is None:
            raise RecipeError(
                f"prune.{wanted.setting} needs the latency of `fit_latency`: give it to make_plan, or call prune_model"
            )
        measure = _measure_latency(cost, latency)
        base = latency.predict(cost.layer_macs({}, {}))
    else:
        measure = _measure_cost(cost, wanted.kind)
        base = getattr(cost.base, wanted.kind)
    budget = BudgetLimit(wanted.setting, wanted.resolve(base), base, measure)
    if budget.target > base:
        raise BudgetError(
            f"prune.{budget.setting} is {budget.show(budget.target)}, the base has only {budget.show(base)}: nothing "
            "to cut"
        )
    return budget


def _measure_latency(cost: CostModel, latency: LatencyModel) -> Callable[[Ranking, Choice], float]:
    return lambda ranking, choice: latency.predict(cost.layer_macs(*ranking.removed(choice)))


def _measure_cost(cost: CostModel, kind: Literal["macs", "params"]) -> Callable[[Ranking, Choice], float]:
    return lambda ranking, choice: getattr(ranking.cost(choice, cost), kind)


def check_budget(
    groups: Sequence[CoupledGroup],
    recipe: PruneRecipe,
    cost: CostModel,
    latency: LatencyModel | None = None,
    blocks: Sequence[ResidualBlock] = (),
) -> None:
    """Refuse, before anything is scored, a budget that no scores could reach.

    Raises:
        BudgetError: Names the smallest figure that can be reached.
        RecipeError: A pattern or a block of the recipe does not exist.
    """
    budget = read_budget(recipe, cost, latency)
    ranking = Ranking(groups, None, recipe, blocks)
    # With fixed fractions the floor depends on who leaves: those budgets are checked after scoring.
    if budget is None or recipe.ratios or recipe.remove_blocks is not None:
        return
    ratios = Ratios.of(recipe)
    lowest = Ratios(*(float(value > 0) for value in (ratios.ratio, ratios.head_ratio, ratios.head_dim_ratio)))
    check_reachable(budget, budget.measure(ranking, ranking.choose(lowest)), recipe)


def check_reachable(budget: BudgetLimit, smallest: float, recipe: PruneRecipe) -> None:
    if smallest > budget.target:
        raise BudgetError(
            f"prune.{budget.setting} {budget.show(budget.target)} cannot be reached: the smallest is "
            f"{budget.show(smallest)} with min_keep {recipe.min_keep}, max_ratio {recipe.max_ratio} and round_to "
            f"{recipe.round_to}"
        )


def solve(ranking: Ranking, ratios: Ratios, budget: BudgetLimit) -> tuple[Choice, Ratios, tuple[str, ...]]:
    """Scale the ratios together until the figure is at most the target; what is left goes back, best channels first.

    Returns:
        The choice, the scaled ratios, and a line where the choice stays more than 0.5 % below the target.

    Raises:
        BudgetError: The floors are above the budget.
        RecipeError: All ratios are 0.
    """
    if max(ratios.ratio, ratios.head_ratio, ratios.head_dim_ratio, ratios.block_ratio) == 0:
        raise RecipeError(f"prune.{budget.setting} needs at least one ratio above 0 to share the cut")

    def figure(share: float) -> float:
        return budget.measure(ranking, ranking.choose(ratios.scaled(share)))

    check_reachable(budget, figure(1.0), ranking.recipe)
    low, high = 0.0, 1.0
    if figure(0.0) <= budget.target:
        high = 0.0
    while high - low > 1e-6:
        middle = (low + high) / 2
        if figure(middle) > budget.target:
            low = middle
        else:
            high = middle
    choice = ranking.choose(ratios.scaled(high))
    choice = swap(ranking, fill(ranking, choice, budget, _relative_worth(ranking, choice)), budget)
    return choice, ratios.scaled(high), report(ranking, choice, budget)


def report(ranking: Ranking, choice: Choice, budget: BudgetLimit) -> tuple[str, ...]:
    reached = budget.measure(ranking, choice)
    if reached >= (1 - _TOLERANCE) * budget.target:
        return ()
    return (
        f"prune.{budget.setting} {budget.show(budget.target)}: {budget.show(reached)} is reached, "
        f"{100 * reached / budget.target:.1f} % of it; no allowed width comes closer (round_to "
        f"{ranking.recipe.round_to}, min_keep {ranking.recipe.min_keep})",
    )


def fill(ranking: Ranking, choice: Choice, budget: BudgetLimit, worth: Worth) -> Choice:
    """Give channels back while the budget allows, the next allowed width of highest worth first."""
    movable = _resizable_teams(ranking, choice)
    allowed = {team[0].name: ranking.allowed(team[0]) for team in movable}
    steps: list[tuple[float, int, int]] = []

    def push(position: int) -> None:
        team = movable[position]
        width = choice.widths[team[0].name]
        upper = next((wider for wider in allowed[team[0].name] if wider > width), None)
        if upper is not None:
            heapq.heappush(steps, (-worth(choice, team, width, upper), position, upper))

    for position in range(len(movable)):
        push(position)
    while steps:
        _, position, upper = heapq.heappop(steps)
        wider = resized(choice, movable[position], upper)
        if budget.measure(ranking, wider) <= budget.target:
            choice = wider
            push(position)
    return choice


def swap(ranking: Ranking, choice: Choice, budget: BudgetLimit) -> Choice:
    """Move one group a step up and another as far down as that takes, while a choice is far below the budget.

    Of all pairs the one that comes nearest goes first.
    """
    movable = _resizable_teams(ranking, choice)
    allowed = {team[0].name: ranking.allowed(team[0]) for team in movable}
    trials, best = 0, budget.measure(ranking, choice)
    while best < (1 - _TOLERANCE) * budget.target:
        found = None
        for up in movable:
            higher = next((width for width in allowed[up[0].name] if width > choice.widths[up[0].name]), None)
            for down in movable if higher is not None else ():
                if up is down or trials >= _MOST_SWAPS:
                    continue
                trials += 1
                trial, value = _fit_down(ranking, resized(choice, up, higher), budget, down, allowed[down[0].name])
                if best < value <= budget.target:
                    found, best = trial, value
        if found is None:
            return choice
        choice = found
    return choice


def _fit_down(
    ranking: Ranking, choice: Choice, budget: BudgetLimit, team: Team, allowed: Sequence[int]
) -> tuple[Choice, float]:
    """Give a group the largest lower width that meets the budget, or its lowest; with the figure of the choice."""

    def figure(width: int) -> float:
        return budget.measure(ranking, resized(choice, team, width))

    lower = [width for width in allowed if width < choice.widths[team[0].name]]
    if not lower:
        return choice, budget.measure(ranking, choice)
    if figure(lower[-1]) <= budget.target:  # most often one step is enough
        return resized(choice, team, lower[-1]), figure(lower[-1])
    width = lower[max(0, bisect_right(lower, budget.target, key=figure) - 1)]
    return resized(choice, team, width), figure(width)


def resized(choice: Choice, team: Team, width: int) -> Choice:
    """Give all groups of a team another width."""
    return replace(choice, widths={**choice.widths, **dict.fromkeys((group.name for group in team), width)})


def movable_teams(ranking: Ranking, choice: Choice) -> list[Team]:
    """Groups that a budget may move, those together that keep equal widths."""
    rules = ranking.rules
    free = [
        group
        for group in ranking.groups
        if group.name in choice.widths and rules[group.name].is_free and rules[group.name].fixed is None
    ]
    return ranking.teams(free)


def _resizable_teams(ranking: Ranking, choice: Choice) -> list[Team]:
    """Those of the `movable_teams` whose widths may change: of no kind with the ratio 0."""
    ratios = Ratios.of(ranking.recipe)
    return [
        team
        for team in movable_teams(ranking, choice)
        if (ratios.head_dim_ratio if team[0].num_heads else ratios.ratio) > 0
    ]


def _relative_worth(ranking: Ranking, choice: Choice) -> Worth:
    """Mean score of the units that come back; scores of unlike classes have unlike scales, so by that of the scope."""
    movable = movable_teams(ranking, choice)
    units = {team[0].name: ranking.team_units(team, choice.heads)[::-1] for team in movable}
    scopes: dict[str, list[np.ndarray]] = {}
    for team in movable:
        scopes.setdefault(ranking.rules[team[0].name].scope, []).append(units[team[0].name])
    means = {scope: float(np.concatenate(values).mean()) or 1.0 for scope, values in scopes.items()}
    return lambda _, team, width, upper: (
        units[team[0].name][width:upper].mean() / means[ranking.rules[team[0].name].scope]
    )
