"""Sharing a budget by what things cost: whatever saves most for the least loss leaves first, of all classes at once.

Scores must be losses, as those of gate_fisher are; the loss of several units is taken as the sum of theirs. What a
unit saves depends on the widths around it, so the cut goes in rounds: each goes a small part of the way to the budget,
by what units save now.
"""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from itertools import pairwise
from typing import NamedTuple

import numpy as np

from isoprune_hf.pruning.deciding.budget import (
    BudgetLimit,
    Worth,
    check_reachable,
    fill,
    movable_teams,
    report,
    resized,
    swap,
)
from isoprune_hf.pruning.deciding.ranking import Choice, Ranking, Ratios, Team
from isoprune_hf.pruning.groups import CoupledGroup

_PART = 0.1  # of what is still to be saved, in one round


class Offer(NamedTuple):
    """A cut of one group (in a uniform layout of one in each block), after all its cheaper ones: loss per saved
    figure, what is saved, and what then stays."""

    rate: float
    position: int
    saved: float
    team: Team
    width: int
    heads: Mapping[str, tuple[int, ...]] | None = None


def solve_knapsack(ranking: Ranking, ratios: Ratios, budget: BudgetLimit) -> tuple[Choice, tuple[str, ...]]:
    """Cut what is cheapest until the budget is met; what is left of it goes back, the dearest first.

    Args:
        ranking: Scores, floors and allowed widths of all groups.
        ratios: Which kinds may be cut at all: those above 0.
        budget: The figure that must not be exceeded.

    Returns:
        The choice, and a line where it stays more than 0.5 % below the target.

    Raises:
        BudgetError: The floors are above the budget.
    """
    lowest = Ratios(*(float(value > 0) for value in (ratios.ratio, ratios.head_ratio, ratios.head_dim_ratio)))
    check_reachable(budget, budget.measure(ranking, ranking.choose(lowest)), ranking.recipe)
    choice = ranking.choose(Ratios(0.0, 0.0, 0.0))
    while (figure := budget.measure(ranking, choice)) > budget.target:
        offers = sorted(_offers(ranking, ratios, budget, choice, figure), key=lambda offer: offer[:2])
        goal, saved = _PART * (figure - budget.target), 0.0
        for offer in offers:
            choice = _take(choice, offer)
            saved += offer.saved
            if saved >= goal:
                break
        if not offers:  # single groups save nothing, as steps of a measured latency may
            choice = ranking.choose(lowest)
    choice = swap(ranking, fill(ranking, choice, budget, _rate(ranking, budget)), budget)
    return choice, report(ranking, choice, budget)


def _take(choice: Choice, offer: Offer) -> Choice:
    if offer.heads is not None:
        return replace(choice, heads={**choice.heads, **offer.heads})
    return resized(choice, offer.team, offer.width)


def _offers(ranking: Ranking, ratios: Ratios, budget: BudgetLimit, choice: Choice, figure: float) -> Iterator[Offer]:
    for position, team in enumerate(movable_teams(ranking, choice)):
        group = team[0]
        if ratios.head_dim_ratio if group.num_heads else ratios.ratio:
            yield from _narrow(ranking, budget, choice, figure, team, position)
        if ratios.head_ratio and len(choice.heads.get(group.name, ())) > ranking.head_floor(group):
            losses, heads = zip(*(_drop_head(ranking, choice, group) for group in team), strict=True)
            offer = Offer(0.0, position, 0.0, team, choice.widths[group.name], dict(heads))
            saved = figure - budget.measure(ranking, _take(choice, offer))
            if saved > 0:
                yield offer._replace(rate=sum(losses) / saved, saved=saved)


def _drop_head(ranking: Ranking, choice: Choice, group: CoupledGroup) -> tuple[float, tuple[str, tuple[int, ...]]]:
    """The loss of the weakest head, by the dims that it still has, and the heads that stay without it."""
    by_head = np.sort(ranking.scores[group.name].reshape(group.num_heads, -1), axis=1)
    losses = by_head[:, -choice.widths[group.name] :].sum(axis=1)
    heads = choice.heads[group.name]
    weakest = min(heads, key=lambda head: losses[head])
    return float(losses[weakest]), (group.name, tuple(head for head in heads if head != weakest))


def _narrow(
    ranking: Ranking, budget: BudgetLimit, choice: Choice, figure: float, team: Team, position: int
) -> Iterator[Offer]:
    """Offer every lower width of a group; a figure falls with a width as a straight line while others stay."""
    width = choice.widths[team[0].name]
    widths = [width, *(lower for lower in reversed(ranking.allowed(team[0])) if lower < width)]
    if len(widths) == 1:
        return
    first = Offer(0.0, position, 0.0, team, widths[1])
    per_unit = (figure - budget.measure(ranking, _take(choice, first))) / (width - widths[1])
    if per_unit <= 0:
        return
    rate = 0.0
    for upper, lower in pairwise(widths):
        saved = per_unit * (upper - lower)
        rate = max(rate, _loss(ranking, choice, team, lower, upper) / saved)
        yield Offer(rate, position, saved, team, lower)


def _loss(ranking: Ranking, choice: Choice, team: Team, lower: int, upper: int) -> float:
    """The loss of going from one width to a lower one."""
    units = ranking.team_units(team, choice.heads)[::-1]
    return float(units[lower:upper].sum()) * sum(len(choice.heads.get(group.name, (0,))) for group in team)


def _rate(ranking: Ranking, budget: BudgetLimit) -> Worth:
    """The loss that comes back per figure that is added."""

    def rate(choice: Choice, team: Team, lower: int, upper: int) -> float:
        added = budget.measure(ranking, resized(choice, team, upper)) - budget.measure(ranking, choice)
        return _loss(ranking, choice, team, lower, upper) / max(added, 1e-12)

    return rate
