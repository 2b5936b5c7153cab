"""Which channels and heads leave, and how many: classes, ranking, rounding, budget."""

import json
import logging
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from isoprune_hf.errors import BudgetError, CheckpointError, RecipeError
from isoprune_hf.pruning.cost import CostModel, ModelCost
from isoprune_hf.pruning.graph import CoupledGroup
from isoprune_hf.pruning.importance import ImportanceScores
from isoprune_hf.recipes import PruneRecipe, parse_budget

logger = logging.getLogger(__name__)

PLAN_VERSION = 1


@dataclass(frozen=True)
class PruningPlan:
    """The decision: what stays in each group that is cut. A value that can be kept, compared and replayed.

    Args:
        kept: Group -> channels that stay, ascending.
        heads: Attention group -> heads that stay, ascending.
        removed_blocks: Residual blocks that leave.
        achieved: `{"base": {"macs", "params"}, "pruned": {...}}`.
        settings: The settings that decided: criterion, scope, ratios, rounding.
        fingerprint: Fingerprint of the base weights.
        version: Version of this format.
    """

    kept: Mapping[str, tuple[int, ...]]
    heads: Mapping[str, tuple[int, ...]]
    removed_blocks: tuple[str, ...] = ()
    achieved: Mapping[str, Mapping[str, int]] = field(default_factory=dict)
    settings: Mapping[str, Any] = field(default_factory=dict)
    fingerprint: str = ""
    version: int = PLAN_VERSION

    def to_json(self) -> str:
        """Write the plan as JSON: sorted, indented, a list of indices on one line."""
        text = json.dumps(asdict(self), indent=2, sort_keys=True)
        return re.sub(r"\[[\d,\s]*\]", lambda match: " ".join(match[0].split()), text) + "\n"

    @classmethod
    def from_json(cls, text: str) -> "PruningPlan":
        """Read a plan that `to_json` wrote.

        Raises:
            CheckpointError: It is no plan, or one of a newer version.
        """
        try:
            values = json.loads(text)
            version = values["version"]
            if version != PLAN_VERSION:
                raise CheckpointError(f"pruning plan: version {version!r}, this code reads {PLAN_VERSION}; update isoprune_hf")
            lists = {key: {name: tuple(indices) for name, indices in values[key].items()} for key in ("kept", "heads")}
            return cls(**{**values, **lists, "removed_blocks": tuple(values["removed_blocks"])})
        except (KeyError, TypeError, AttributeError, json.JSONDecodeError) as error:
            raise CheckpointError(f"pruning plan: not a plan of isoprune_hf ({error})") from error

    @classmethod
    def load(cls, path: str | Path) -> "PruningPlan":
        """Read `pruning_plan.json`."""
        return cls.from_json(Path(path).read_text())


@dataclass(frozen=True)
class _Choice:
    """Counts that stay: channels of plain groups, dims of each head of attention groups; and the heads that stay."""

    widths: Mapping[str, int]
    heads: Mapping[str, tuple[int, ...]]


def make_plan(
    groups: Sequence[CoupledGroup], scores: ImportanceScores, recipe: PruneRecipe, *, cost: CostModel
) -> PruningPlan:
    """Decide what leaves; touches no weights and needs no data.

    Every class gives up the same fraction of its channels, its lowest-scored ones. With `recipe.target_macs` the ratios are scaled
    together by bisection until the cost meets the budget from below; what is left of it goes back to the best of the removed channels.

    Args:
        groups: Groups of `trace_groups`.
        scores: Scores of these groups.
        recipe: Scope, ratios or budget, floors and rounding.
        cost: Cost of every width, of `cost_model`.

    Raises:
        BudgetError: The budget is below what the floors allow, or above the base.
        RecipeError: The scores are not of these groups.
    """
    _check_scores(groups, scores)
    ranking = _Ranking(groups, scores, recipe)
    ratios = {
        "ratio": recipe.ratio,
        "head_ratio": recipe.head_ratio,
        "head_dim_ratio": recipe.ratio if recipe.head_dim_ratio is None else recipe.head_dim_ratio,
    }
    if recipe.target_macs is None:
        choice = ranking.choose(**ratios)
    else:
        target = parse_budget(recipe.target_macs, cost.base.macs, "prune.target_macs")
        choice, ratios = _solve(ranking, ratios, target, cost)
    settings = {
        "criterion": scores.criterion,
        "sample": dict(scores.sample),
        "scope": recipe.scope,
        "target_macs": recipe.target_macs,
        "min_keep": recipe.min_keep,
        "max_ratio": recipe.max_ratio,
        "round_to": recipe.round_to,
        **ratios,
    }
    kept = {g.name: ranking.keep(g, choice) for g in groups}
    return PruningPlan(
        kept={g.name: kept[g.name] for g in groups if len(kept[g.name]) < g.channels},
        heads={g.name: choice.heads[g.name] for g in groups if g.num_heads and len(kept[g.name]) < g.channels},
        achieved={"base": cost.base.to_dict(), "pruned": ranking.cost(choice, cost).to_dict()},
        settings=settings,
        fingerprint=scores.fingerprint,
    )


def _check_scores(groups: Sequence[CoupledGroup], scores: ImportanceScores) -> None:
    if not groups:
        raise RecipeError("no channels that could leave were found in this model")
    for group in groups:
        if group.name not in scores.scores or len(scores.scores[group.name]) != group.channels:
            raise RecipeError(f"the scores are of another model: they do not fit the {group.channels} channels of {group.name}")


class _Ranking:
    """The scores in the order in which channels leave, for one recipe; `choose` answers for any ratios."""

    def __init__(self, groups: Sequence[CoupledGroup], scores: ImportanceScores, recipe: PruneRecipe):
        self.groups = groups
        self.recipe = recipe
        self.scores = {group.name: scores.scores[group.name].double().numpy() for group in groups}

    def choose(self, ratio: float, head_ratio: float, head_dim_ratio: float) -> _Choice:
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
        return _Choice(widths, heads)

    def keep(self, group: CoupledGroup, choice: _Choice) -> tuple[int, ...]:
        """Channels of a group that stay: the best of the group, or of each kept head."""
        width, score = choice.widths[group.name], self.scores[group.name]
        if not group.num_heads:
            return tuple(sorted(_best(score, width)))
        by_head = score.reshape(group.num_heads, -1)
        return tuple(head * group.head_dim + dim for head in choice.heads[group.name] for dim in sorted(_best(by_head[head], width)))

    def cost(self, choice: _Choice, cost: CostModel) -> ModelCost:
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
        """What competes: channels; in attention, the weakest dim of every kept head together, then the second weakest, ..."""
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
        ratio: Fraction of all units that leaves; exactly round(ratio x units), ties by (group order, index), as far as the floors allow.

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
        Group -> an allowed width: the next lower one, or the next higher one for the groups that lost most by rounding down.
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


def _solve(
    ranking: _Ranking, ratios: Mapping[str, float], target: int, cost: CostModel
) -> tuple[_Choice, dict[str, float]]:
    """Scale the ratios together until the cost is at most `target`; the rest of the budget goes back, best channels first."""
    largest = max(ratios.values())
    if largest == 0:
        raise RecipeError("prune.target_macs needs at least one ratio above 0 to share the cut")

    def scaled(share: float) -> dict[str, float]:
        return {name: ratio / largest * share for name, ratio in ratios.items()}

    if target > cost.base.macs:
        raise BudgetError(f"prune.target_macs is {target / 1e9:.4g} G, the base has only {cost.base.macs / 1e9:.4g} G: nothing to cut")
    smallest = ranking.cost(ranking.choose(**scaled(1.0)), cost).macs
    if smallest > target:
        raise BudgetError(
            f"prune.target_macs {target / 1e9:.4g} G cannot be reached: the smallest is {smallest / 1e9:.4g} G with min_keep "
            f"{ranking.recipe.min_keep}, max_ratio {ranking.recipe.max_ratio}, round_to {ranking.recipe.round_to} and these ratios"
        )
    low, high = 0.0, 1.0
    if cost.base.macs <= target:
        high = 0.0
    for _ in range(40):
        middle = (low + high) / 2
        if ranking.cost(ranking.choose(**scaled(middle)), cost).macs > target:
            low = middle
        else:
            high = middle
    return _fill(ranking, ranking.choose(**scaled(high)), target, cost), scaled(high)


def _fill(ranking: _Ranking, choice: _Choice, target: int, cost: CostModel) -> _Choice:
    """Give channels back while the budget allows, the next allowed width of the best-scored group first."""
    widths = dict(choice.widths)
    units = {group.name: np.sort(ranking.units(group, choice.heads))[::-1] for group in ranking.groups}
    allowed = {group.name: ranking.allowed(group, len(units[group.name])) for group in ranking.groups}
    stuck: set[str] = set()
    while True:
        steps = []
        for position, (name, scores) in enumerate(units.items()):
            upper = next((width for width in allowed[name] if width > widths[name]), None)
            if upper is not None and name not in stuck:
                steps.append((-scores[widths[name] : upper].mean(), position, name, upper))
        if not steps:
            return _Choice(widths, choice.heads)
        _, _, name, upper = min(steps)
        if ranking.cost(_Choice({**widths, name: upper}, choice.heads), cost).macs <= target:
            widths[name] = upper
        else:
            stuck.add(name)
