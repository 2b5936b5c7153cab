"""The decision: a plan that says what stays, made from scores and ratios or from a budget."""

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from isoprune_hf.errors import CheckpointError, RecipeError
from isoprune_hf.pruning.budget import read_budget, solve
from isoprune_hf.pruning.cost import CostModel
from isoprune_hf.pruning.counting import width_step
from isoprune_hf.pruning.groups import CoupledGroup, ResidualBlock
from isoprune_hf.pruning.importance import ImportanceScores
from isoprune_hf.pruning.latency import LatencyModel
from isoprune_hf.pruning.ranking import Choice, Ranking, Ratios
from isoprune_hf.recipes import BUDGETS, PruneRecipe

PLAN_VERSION = 1
# Settings that change a decision; the ratios are recorded as the budget has scaled them.
_SETTINGS = (
    *("score_batchnorm", "reduction", "normalizer", "scope", "scopes", "signature", "ratios", "include", "exclude"),
    *("head_dims", "remove_blocks", *BUDGETS, "min_keep", "max_ratio", "round_to", "steps"),
)


@dataclass(frozen=True)
class PruningPlan:
    """The decision: what stays in each group that is cut. A value that can be kept, compared and replayed.

    Args:
        kept: Group -> channels that stay, ascending.
        heads: Attention group -> heads that stay, ascending.
        removed_blocks: Residual blocks that leave whole, with all their groups.
        margins: First group of a scope -> the highest score that left it (`removed`) and the lowest that stayed
            (`kept`), before widths were rounded. A small gap says that other images could decide otherwise.
        notes: What the user should know: widths that could not be aligned, a budget that is not used up.
        achieved: `{"base": {"macs", "params"}, "pruned": {...}}`; a latency budget adds `latency_ms`.
        settings: The settings that decided: criterion, scope, ratios, rounding.
        fingerprint: Fingerprint of the base weights.
        version: Version of this format.
    """

    kept: Mapping[str, tuple[int, ...]]
    heads: Mapping[str, tuple[int, ...]]
    removed_blocks: tuple[str, ...] = ()
    margins: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    achieved: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    settings: Mapping[str, Any] = field(default_factory=dict)
    fingerprint: str = ""
    version: int = PLAN_VERSION

    def to_json(self) -> str:
        """Write the plan as JSON: sorted, indented, a list of indices on one line."""
        text = json.dumps(asdict(self), indent=2, sort_keys=True)
        return re.sub(r"\[[\d,\s]*\]", lambda match: f"[{' '.join(match[0][1:-1].split())}]", text) + "\n"

    @classmethod
    def from_json(cls, text: str) -> "PruningPlan":
        """Read a plan that `to_json` wrote, perhaps changed by hand.

        Raises:
            CheckpointError: It is no plan, one of a newer version, or an entry is of the wrong type.
        """
        try:
            values = json.loads(text)
        except ValueError as error:
            raise CheckpointError(f"pruning plan: not readable as JSON ({error})") from error
        version = values.get("version") if isinstance(values, dict) else None
        if type(version) is not int or not {"kept", "heads"} <= values.keys():
            raise CheckpointError("pruning plan: not a plan of isoprune_hf: needs version, kept and heads")
        if version != PLAN_VERSION:
            raise CheckpointError(
                f"pruning plan: version {version}, this code reads {PLAN_VERSION}; update isoprune_hf"
            )
        unknown = values.keys() - {entry.name for entry in fields(cls)}
        if unknown:
            raise CheckpointError(f"pruning plan: unknown entry {sorted(unknown)[0]!r}")
        for key in ("kept", "heads"):
            values[key] = {name: _read_indices(key, name, entry) for name, entry in _read_mapping(values, key)}
        for key in ("margins", "achieved", "settings"):
            values[key] = dict(_read_mapping(values, key))
        for key in ("removed_blocks", "notes"):
            values[key] = tuple(_read_texts(values, key))
        return cls(**values)

    @classmethod
    def load(cls, path: str | Path) -> "PruningPlan":
        """Read `pruning_plan.json`.

        Raises:
            CheckpointError: There is no such file, or it is no plan.
        """
        try:
            return cls.from_json(Path(path).read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError) as error:
            raise CheckpointError(f"pruning plan: {path} cannot be read ({error})") from error


def _read_mapping(values: Mapping[str, Any], key: str) -> Iterable[tuple[str, Any]]:
    entry = values.get(key, {})
    if not isinstance(entry, dict):
        raise CheckpointError(f"pruning plan: {key} must be a mapping, got {entry!r}")
    return entry.items()


def _read_indices(key: str, name: str, entry: Any) -> tuple[int, ...]:
    if not isinstance(entry, list) or any(type(index) is not int for index in entry):
        raise CheckpointError(f"pruning plan: {key}[{name!r}] must be a list of whole numbers")
    return tuple(entry)


def _read_texts(values: Mapping[str, Any], key: str) -> list[str]:
    entry = values.get(key, [])
    if not isinstance(entry, list) or any(type(text) is not str for text in entry):
        raise CheckpointError(f"pruning plan: {key} must be a list of texts, got {entry!r}")
    return entry


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

    Every class gives up the same fraction of its channels, its lowest-scored ones. With a budget the ratios are scaled
    together by bisection until the figure meets it from below; what is left of it goes back to the best of the removed
    channels.

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
    ranking = Ranking(groups, scores, recipe, blocks)
    ratios, notes = Ratios.of(recipe), ()
    budget = read_budget(recipe, cost, latency)
    if budget is None:
        choice = ranking.choose(ratios)
    else:
        choice, ratios, notes = solve(ranking, ratios, budget)
    kept = {group.name: ranking.keep(group, choice) for group in groups if group.name in choice.widths}
    cut = [group for group in groups if len(kept.get(group.name, ())) not in (0, group.channels)]
    settings = {
        "criterion": scores.criterion,
        "sample": {key: value for key, value in scores.sample.items() if isinstance(value, str | int)},
        **{name: getattr(recipe, name) for name in _SETTINGS},
        **asdict(ratios),
    }
    return PruningPlan(
        kept={group.name: kept[group.name] for group in cut},
        heads={group.name: choice.heads[group.name] for group in cut if group.num_heads},
        removed_blocks=choice.removed_blocks,
        margins=choice.margins,
        notes=(*notes, *_unaligned(ranking, choice)),
        achieved={} if cost is None else {"base": cost.base.to_dict(), "pruned": ranking.cost(choice, cost).to_dict()},
        settings=settings,
        fingerprint=scores.fingerprint,
    )


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
