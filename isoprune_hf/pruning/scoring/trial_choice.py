"""Choose the trial cuts that are measured, and by how many images, within a budget: `choose_trials`.

The unit of the budget is one image that passes through the whole network. A trial starts shortly before its cut, so
it takes a share of that.
"""

from collections.abc import Mapping, Sequence
from typing import Generic, NamedTuple, TypeVar

PASSES = 2  # over all images, that trials take at most
_MOST = 24  # images that judge a cut
_LEAST = 4  # if several cuts of a group are measured, unless fewer are set aside
Cut = TypeVar("Cut")


class Trials(NamedTuple, Generic[Cut]):
    """The trial cuts that are measured.

    Args:
        cuts: The cuts of each group; a group may have none.
        judges: Images of all ranks that judge each of them.
        passes: Passes of one image through the whole network that this takes.
    """

    cuts: dict[str, list[Cut]]
    judges: int
    passes: float


def choose_trials(
    candidates: Mapping[str, Sequence[Cut]], shares: Mapping[str, float], *, images: int, held: int
) -> Trials[Cut]:
    """Choose as many cuts of each group as the budget allows, then as many images to judge them.

    The same images judge all cuts, so that even one of them compares groups.

    Args:
        candidates: Group -> possible cuts, ascending by the number of channels. Neighbours are alike: where the budget
            does not suffice for every group, evenly spaced ones are chosen.
        shares: Group -> share of the network that runs in a trial.
        images: Images of all ranks.
        held: Those of them that are set aside to judge.
    """
    budget = PASSES * images
    names = list(candidates)
    most = max(map(len, candidates.values()), default=0)
    options = [(names, count, min(held, _LEAST)) for count in range(most, 0, -1)]
    options += [(_evenly(names, count), 1, 1) for count in range(len(names), 0, -1)]
    for chosen, count, least in options if held else []:
        cuts = {name: _evenly(candidates[name], count) for name in chosen}
        cost = sum(shares[name] * len(own) for name, own in cuts.items())
        if cost * least <= budget:
            judges = min(held, _MOST, int(budget / cost) if cost else _MOST)
            return Trials({name: cuts.get(name, []) for name in names}, judges, judges * cost)
    return Trials({name: [] for name in names}, 0, 0.0)


def _evenly(values: Sequence[Cut], count: int) -> list[Cut]:
    """Return so many evenly spaced values, or all if there are fewer."""
    if count >= len(values):
        return list(values)
    return [values[(2 * place + 1) * len(values) // (2 * count)] for place in range(count)]
