"""Who leaves at given ratios: isomorphic classes, ranking inside them, floors and rounding."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from isoprune_hf.pruning.cost import CostModel, ModelCost
from isoprune_hf.pruning.groups import CoupledGroup
from isoprune_hf.pruning.importance import ImportanceScores
from isoprune_hf.recipes import PruneRecipe


@dataclass(frozen=True)
class Choice:
    """Counts that stay: channels of plain groups, dims of each head of attention groups; and the heads that stay."""

    widths: Mapping[str, int]
    heads: Mapping[str, tuple[int, ...]]


class Ranking:
    """The scores in the order in which channels leave, for one recipe; `choose` answers for any ratios."""

    def __init__(self, groups: Sequence[CoupledGroup], scores: ImportanceScores, recipe: PruneRecipe):
        self.groups = groups
        self.recipe = recipe
        self.scores = {group.name: scores.scores[group.name].double().numpy() for group in groups}

    def choose(self, ratio: float, head_ratio: float, head_dim_ratio: float) -> Choice:
        """Counts that stay in every group at the given ratios."""
        heads = self._choose_heads(head_ratio)
        pools: dict[tuple[str, float], list[CoupledGroup]] = {}
        for group in self.groups:
            pools.setdefault((self._scope(group), head_dim_ratio if group.num_heads else ratio), []).append(group)
        widths: dict[str, int] = {}
        for (_, pool_ratio), pool in pools.items():
            units = {group.name: np.sort(self.units(group, heads)) for group in pool}
            floors = {name: self._floor(len(values)) for name, values in units.items()}
            counts = keep_counts(units, floors, pool_ratio)
            widths |= round_counts(counts, {g.name: self.allowed(g, len(units[g.name])) for g in pool})
        return Choice(widths, heads)

    def keep(self, group: CoupledGroup, choice: Choice) -> tuple[int, ...]:
        """Channels of a group that stay: the best of the group, or of each kept head."""
        width, score = choice.widths[group.name], self.scores[group.name]
        if not group.num_heads:
            return tuple(sorted(_best(score, width)))
        by_head = score.reshape(group.num_heads, -1)
        return tuple(
            head * group.head_dim + dim
            for head in choice.heads[group.name]
            for dim in sorted(_best(by_head[head], width))
        )

    def cost(self, choice: Choice, cost: CostModel) -> ModelCost:
        """Cost of the model that a choice makes."""
        removed, removed_heads = {}, {}
        for group in self.groups:
            heads = len(choice.heads.get(group.name, ())) or 1
            removed[group.name] = group.channels - choice.widths[group.name] * heads
            removed_heads[group.name] = group.num_heads - heads if group.num_heads else 0
        return cost.cost(removed, removed_heads)

    def allowed(self, group: CoupledGroup, size: int) -> list[int]:
        """Widths that a group may have: multiples of `round_to` from the floor on, and its full size."""
        # A channel of a grouped layer stands for one channel in each of its groups.
        ways = 1 if group.num_heads else group.members[0].index.shape[1]
        step = self.recipe.round_to // math.gcd(self.recipe.round_to, ways)
        floor = self._floor(size)
        return [*range(math.ceil(floor / step) * step, size, step), size]

    def _scope(self, group: CoupledGroup) -> str:
        return {"isomorphic": group.signature, "global": "", "local": group.name}[self.recipe.scope]

    def _floor(self, size: int) -> int:
        return min(size, max(self.recipe.min_keep, size - math.floor(size * self.recipe.max_ratio + 1e-9)))

    def units(self, group: CoupledGroup, heads: Mapping[str, tuple[int, ...]]) -> np.ndarray:
        """What competes: channels; in attention, the weakest dims of all kept heads, then the second weakest."""
        score = self.scores[group.name]
        if not group.num_heads:
            return score
        return np.sort(score.reshape(group.num_heads, -1)[list(heads[group.name])], axis=1).mean(axis=0)

    def _choose_heads(self, head_ratio: float) -> dict[str, tuple[int, ...]]:
        attention = [group for group in self.groups if group.num_heads]
        pools: dict[str, list[CoupledGroup]] = {}
        for group in attention:
            pools.setdefault(self._scope(group), []).append(group)
        heads: dict[str, tuple[int, ...]] = {}
        for pool in pools.values():
            means = {group.name: self.scores[group.name].reshape(group.num_heads, -1).mean(axis=1) for group in pool}
            floors = {
                g.name: max(1, g.num_heads - math.floor(g.num_heads * self.recipe.max_ratio + 1e-9)) for g in pool
            }
            counts = keep_counts(means, floors, head_ratio)
            heads |= {name: tuple(sorted(_best(means[name], count))) for name, count in counts.items()}
        return heads


def _best(scores: np.ndarray, count: int) -> list[int]:
    """Indices of the `count` highest scores; of equal ones, those with the lower index leave first."""
    return np.argsort(scores, kind="stable")[len(scores) - count :].tolist()


def keep_counts(units: Mapping[str, np.ndarray], floors: Mapping[str, int], ratio: float) -> dict[str, int]:
    """Let the lowest-scored units of a pool leave.

    Args:
        units: Group -> scores of its units.
        floors: Group -> units that must stay; its best ones are out of the competition.
        ratio: Fraction of all units that leaves; exactly round(ratio x units), ties by (group order, index), as far as
            the floors allow.

    Returns:
        Group -> number of units that stay.
    """
    names = list(units)
    owners, values = [], []
    for position, name in enumerate(names):
        free = np.sort(units[name], kind="stable")[: len(units[name]) - floors[name]]
        owners.append(np.full(len(free), position))
        values.append(free)
    total = sum(len(scores) for scores in units.values())
    leaving = np.concatenate(owners)[np.argsort(np.concatenate(values), kind="stable")][: round(ratio * total)]
    counts = np.bincount(leaving, minlength=len(names))
    return {name: len(units[name]) - int(counts[position]) for position, name in enumerate(names)}


def round_counts(counts: Mapping[str, int], allowed: Mapping[str, Sequence[int]]) -> dict[str, int]:
    """Move every count to an allowed width so that the pool keeps its sum as nearly as the widths permit.

    Args:
        counts: Group -> units that stay.
        allowed: Group -> ascending widths to choose from.

    Returns:
        Group -> an allowed width: the next lower one, or the next higher one for the groups that lost most by rounding
        down.
    """
    widths, rise = {}, []
    for position, (name, count) in enumerate(counts.items()):
        lower = max((width for width in allowed[name] if width <= count), default=allowed[name][0])
        widths[name] = lower
        upper = next((width for width in allowed[name] if width > lower), None)
        if upper is not None and count > lower:
            rise.append(((lower - count) / (upper - lower), position, name, upper))
    missing = sum(counts.values()) - sum(widths.values())
    for _, _, name, upper in sorted(rise):
        if 2 * missing >= upper - widths[name]:
            missing -= upper - widths[name]
            widths[name] = upper
    return widths
