"""Show the groups of a model and the effect of several plans: as tables in a terminal or as a page with plots.

Collect the values in an `Inspected`, then call `show_inspected` (text) or `build_page` (HTML).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from isoprune_hf.pruning.cost.macs import ModelCost
from isoprune_hf.pruning.groups import CoupledGroup
from isoprune_hf.pruning.plan import PruningPlan
from isoprune_hf.pruning.scoring.scores import ImportanceScores
from isoprune_hf.reporting.page_plots import draw_bars, draw_scales, draw_scores
from isoprune_hf.reporting.tables import align_columns, format_figure, shorten

_TEMPLATE = Path(__file__).with_name("inspection_page.html")
_QUANTILES = {"lowest": 0.0, "25 %": 0.25, "median": 0.5, "75 %": 0.75, "highest": 1.0}
Table = list[list[str]]  # the first row is the heading


@dataclass(frozen=True, eq=False)
class Inspected:
    """A model with its groups, and the plans to compare.

    Args:
        name: Name of the model.
        groups: Its coupled groups, in the order of the network.
        plans: Name -> a plan for these groups; may be empty.
        scores: Scores that the plans were decided from, or None if they are not known.
        cost: Cost of the unpruned model, or None if it was not counted.
        budget: Heading that states the budget that all plans share.
    """

    name: str
    groups: Sequence[CoupledGroup]
    plans: Mapping[str, PruningPlan] = field(default_factory=dict)
    scores: ImportanceScores | None = None
    cost: ModelCost | None = None
    budget: str = ""

    @cached_property
    def classes(self) -> dict[str, list[CoupledGroup]]:
        """Signature -> its groups, in the order of the network."""
        found: dict[str, list[CoupledGroup]] = {}
        for group in self.groups:
            found.setdefault(group.signature, []).append(group)
        return found

    def kept(self, plan: str, group: CoupledGroup) -> Sequence[int]:
        """Return the kept channels of a group: all if the plan does not name it, none if its block is removed."""
        removed = tuple(f"{block}." for block in self.plans[plan].removed_blocks)
        if removed and all(member.parameter.startswith(removed) for member in group.members):
            return ()
        return self.plans[plan].kept.get(group.name, range(group.channels))

    def share(self, plan: str, groups: Sequence[CoupledGroup]) -> float:
        """Return the kept fraction of the channels of some groups."""
        return sum(len(self.kept(plan, group)) for group in groups) / sum(group.channels for group in groups)

    def scores_of(self, groups: Sequence[CoupledGroup], plan: str | None = None) -> np.ndarray:
        """Return the scores of the channels of some groups, (channels,); with a plan only of those that it keeps.

        Groups that the criterion could not score have none.

        Raises:
            ValueError: The model has no scores.
        """
        if self.scores is None:
            raise ValueError(f"{self.name} has no scores")
        scores = self.scores.scores
        groups = [group for group in groups if group.name in scores]
        values = [scores[group.name].double().numpy() for group in groups]
        if plan is not None:
            values = [value[list(self.kept(plan, group))] for value, group in zip(values, groups, strict=True)]
        return np.concatenate([np.zeros(0), *values])

    def to_dict(self) -> dict[str, Any]:
        """Return the tables as plain values: costs of base and plans, and the kept channels of classes and groups."""

        def widths(groups: Sequence[CoupledGroup]) -> dict[str, Any]:
            kept = {plan: sum(len(self.kept(plan, group)) for group in groups) for plan in self.plans}
            return {"channels": sum(group.channels for group in groups), "kept": kept}

        return {
            "model": self.name,
            "base": None if self.cost is None else self.cost.to_dict(),
            "plans": {name: dict(plan.achieved.get("pruned", {})) for name, plan in self.plans.items()},
            "classes": [
                {"signature": name, "groups": [group.name for group in groups], **widths(groups)}
                for name, groups in self.classes.items()
            ],
            "groups": {group.name: {"heads": group.num_heads, **widths([group])} for group in self.groups},
        }

    @property
    def heading(self) -> str:
        """Name and size of the model in one line."""
        classes = f"{len(self.groups)} coupled groups in {len(self.classes)} isomorphic classes"
        size = "" if self.cost is None else f", {_macs(self.cost.macs)} GMACs, {_params(self.cost.params)} M params"
        return f"{self.name}: {classes}{size}"


def tabulate_classes(model: Inspected) -> Table:
    """Return a row for each class: its groups, channels and widths, and the share that each plan keeps."""
    rows = [["class", "groups", "channels", "widths", *(f"{plan} keeps" for plan in model.plans), "built of"]]
    for number, (signature, groups) in enumerate(model.classes.items(), 1):
        widths = list(dict.fromkeys(_size(group, range(group.channels)) for group in groups))
        listed = ", ".join(widths if len(widths) <= 4 else [*widths[:3], "...", widths[-1]])
        shares = [f"{model.share(plan, groups):.0%}" for plan in model.plans]
        channels = sum(group.channels for group in groups)
        rows.append([str(number), str(len(groups)), str(channels), listed, *shares, signature])
    return rows


def tabulate_plans(model: Inspected) -> Table:
    """Return a row for each plan: its cost, the number of pruned groups, and the group with the smallest share."""
    rows = [["plan", "GMACs", "M params", "groups cut", "narrowest", "which is of"]]
    if model.cost is not None:
        rows.append(["before", _macs(model.cost.macs), _params(model.cost.params), "", "", ""])
    for name, plan in model.plans.items():
        cost = plan.achieved.get("pruned", {})
        cut = [group for group in model.groups if len(model.kept(name, group)) < group.channels]
        rows.append([name, _macs(cost.get("macs")), _params(cost.get("params")), str(len(cut))])
        shares = [model.share(name, [group]) for group in model.groups]
        narrowest = model.groups[shares.index(min(shares))]
        width = f"{len(model.kept(name, narrowest))} of {narrowest.channels} ({min(shares):.0%})"
        rows[-1] += [width, narrowest.name]
    return rows


def tabulate_scores(model: Inspected) -> Table:
    """Return a row for each class: quantiles of its scores, and the number of channels with the score 0."""
    rows = [["class", *_QUANTILES, "score 0"]]
    for number, groups in enumerate(model.classes.values(), 1):
        values = model.scores_of(groups)
        quantiles = np.quantile(values, list(_QUANTILES.values())) if len(values) else ()
        figures = [f"{value:.3g}" for value in quantiles] or ["-"] * len(_QUANTILES)
        rows.append([str(number), *figures, str(int((values == 0).sum()))])
    return rows


def tabulate_groups(model: Inspected) -> Table:
    """Return a row for each group: its width before and with each plan; for attention, heads x dims of a head."""
    number = {signature: str(place) for place, signature in enumerate(model.classes, 1)}
    rows = [["group", "class", "before", *model.plans]]
    for group in model.groups:
        widths = [_size(group, kept) for kept in (range(group.channels), *(model.kept(p, group) for p in model.plans))]
        rows.append([group.name, number[group.signature], *widths])
    return rows


def show_inspected(model: Inspected) -> str:
    """Return all tables as text for a terminal."""
    classes = [[f"{row[0]:>2}  {shorten(row[-1], 48)}", *row[1:-1]] for row in tabulate_classes(model)]
    parts = [model.heading, align_columns(classes)]
    if model.scores is not None:
        parts.append(f"scores by {model.scores.criterion}\n{align_columns(tabulate_scores(model))}")
    if model.budget:
        parts.append(f"{model.budget}\n{align_columns(tabulate_plans(model))}")
    parts.append(align_columns(tabulate_groups(model)))
    return "\n\n".join(parts)


def build_page(model: Inspected) -> str:
    """Return an HTML page that loads nothing: no script, and no font or picture from elsewhere.

    Returns:
        A document that is also well-formed XML; all texts are escaped.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    cards = []
    for number, ((signature, groups), row) in enumerate(
        zip(model.classes.items(), tabulate_classes(model)[1:], strict=True), 1
    ):
        plots = [(f"Widths of the groups of class {number} before and after the cut", _plot_widths(model, number))]
        if model.scores is not None:
            kept = {plan: model.scores_of(groups, plan) for plan in model.plans}
            histogram = draw_scores(model.scores_of(groups), kept, name=f"scores-{number}")
            plots.append((f"Histogram of the scores of class {number}", histogram))
        cards.append({"number": number, "signature": signature, "row": row, "plots": _safe(plots)})
    return environment.from_string(_TEMPLATE.read_text(encoding="utf-8")).render(
        model=model,
        overview=_safe(_plot_overview(model)),
        class_table=[row[:-1] for row in tabulate_classes(model)],
        plans=tabulate_plans(model) if model.plans else None,
        scores=tabulate_scores(model) if model.scores is not None else None,
        groups=tabulate_groups(model),
        cards=cards,
        notes={name: plan.notes for name, plan in model.plans.items() if plan.notes},
    )


def _plot_overview(model: Inspected) -> list[tuple[str, str]]:
    plots = []
    if model.plans:
        shares = {
            f"class {number}": (100.0, [100 * model.share(plan, groups) for plan in model.plans])
            for number, groups in enumerate(model.classes.values(), 1)
        }
        picture = draw_bars(shares, list(model.plans), label="kept channels (%)", name="shares")
        plots.append(("How much of each class stays", picture))
    if model.scores is not None:
        scales = {f"class {number}": model.scores_of(g) for number, g in enumerate(model.classes.values(), 1)}
        plots.append(("Scores of all classes on one scale", draw_scales(scales, name="scales")))
    return plots


def _plot_widths(model: Inspected, number: int) -> str:
    groups = list(model.classes.values())[number - 1]
    rows = {g.name: (float(g.channels), [float(len(model.kept(plan, g))) for plan in model.plans]) for g in groups}
    return draw_bars(rows, list(model.plans), label="channels", name=f"widths-{number}")


def _safe(plots: Sequence[tuple[str, str]]) -> list[tuple[str, Markup]]:
    """Mark pictures as HTML; matplotlib has escaped their texts."""
    return [(title, Markup(picture)) for title, picture in plots]


def _size(group: CoupledGroup, kept: Sequence[int]) -> str:
    """Return the number of channels, or heads x dims of a head."""
    if not group.num_heads or not kept:
        return str(len(kept))
    heads = len({channel // group.head_dim for channel in kept})
    return f"{heads} x {len(kept) // heads}"


def _macs(value: float | None) -> str:
    return format_figure("macs", value)


def _params(value: float | None) -> str:
    return format_figure("params", value)
