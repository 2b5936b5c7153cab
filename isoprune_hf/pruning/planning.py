"""The decision: a plan that says what stays, made from scores and ratios or from a budget."""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from isoprune_hf.errors import BudgetError, CheckpointError, RecipeError
from isoprune_hf.pruning.cost import CostModel
from isoprune_hf.pruning.groups import CoupledGroup
from isoprune_hf.pruning.importance import ImportanceScores
from isoprune_hf.pruning.ranking import Choice, Ranking
from isoprune_hf.recipes import PruneRecipe, parse_budget

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
        return re.sub(r"\[[\d,\s]*\]", lambda match: f"[{' '.join(match[0][1:-1].split())}]", text) + "\n"

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
                raise CheckpointError(
                    f"pruning plan: version {version!r}, this code reads {PLAN_VERSION}; update isoprune_hf"
                )
            lists = {key: {name: tuple(indices) for name, indices in values[key].items()} for key in ("kept", "heads")}
            return cls(**{**values, **lists, "removed_blocks": tuple(values["removed_blocks"])})
        except (KeyError, TypeError, AttributeError, json.JSONDecodeError) as error:
            raise CheckpointError(f"pruning plan: not a plan of isoprune_hf ({error})") from error

    @classmethod
    def load(cls, path: str | Path) -> "PruningPlan":
        """Read `pruning_plan.json`."""
        return cls.from_json(Path(path).read_text())


def make_plan(
    groups: Sequence[CoupledGroup], scores: ImportanceScores, recipe: PruneRecipe, *, cost: CostModel
) -> PruningPlan:
    """Decide what leaves; touches no weights and needs no data.

    Every class gives up the same fraction of its channels, its lowest-scored ones. With `recipe.target_macs` the
    ratios are scaled together by bisection until the cost meets the budget from below; what is left of it goes back to
    the best of the removed channels.

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
    ranking = Ranking(groups, scores, recipe)
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
            raise RecipeError(
                f"the scores are of another model: they do not fit the {group.channels} channels of {group.name}"
            )


def _solve(
    ranking: Ranking, ratios: Mapping[str, float], target: int, cost: CostModel
) -> tuple[Choice, dict[str, float]]:
    """Scale the ratios together until the cost is at most `target`; what is left goes back, best channels first."""
    recipe, largest = ranking.recipe, max(ratios.values())
    if largest == 0:
        raise RecipeError("prune.target_macs needs at least one ratio above 0 to share the cut")

    def scaled(share: float) -> dict[str, float]:
        return {name: ratio / largest * share for name, ratio in ratios.items()}

    if target > cost.base.macs:
        raise BudgetError(
            f"prune.target_macs is {target / 1e9:.4g} G, the base has only {cost.base.macs / 1e9:.4g} G: "
            "nothing to cut"
        )
    smallest = ranking.cost(ranking.choose(**scaled(1.0)), cost).macs
    if smallest > target:
        raise BudgetError(
            f"prune.target_macs {target / 1e9:.4g} G cannot be reached: the smallest is {smallest / 1e9:.4g} G "
            f"with min_keep {recipe.min_keep}, max_ratio {recipe.max_ratio} and round_to {recipe.round_to}"
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


def _fill(ranking: Ranking, choice: Choice, target: int, cost: CostModel) -> Choice:
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
            return Choice(widths, choice.heads)
        _, _, name, upper = min(steps)
        if ranking.cost(Choice({**widths, name: upper}, choice.heads), cost).macs <= target:
            widths[name] = upper
        else:
            stuck.add(name)
