"""Pictures that are written to a file: `draw_classes` (the kept share of each group) and `draw_frontier`."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from isoprune_hf.pruning.groups import CoupledGroup
from isoprune_hf.pruning.plan import PruningPlan
from isoprune_hf.reporting.class_text import describe_class
from isoprune_hf.reporting.figures import (
    CLASS_COLORS,
    DPI,
    LIGHT,
    SVG_METADATA,
    Theme,
    check_plotting,
    open_figure,
)
from isoprune_hf.reporting.tables import COLUMNS, PERCENTAGES, format_figure, shorten

__all__ = ["check_plotting", "describe_cost", "draw_classes", "draw_frontier"]

_MAX_BARS = 16  # of one class
_LINE_HEIGHT = 0.26  # inches for one bar or one line of text
_PANEL_GAP = 1.9  # lines for the heading of a panel and the gap below it
_WIDTH = 10.0  # inches
_LEFT_TEXT = -0.475  # horizontal places, as fractions of the width of the longest bar
_RIGHT_TEXT = 1.14
_FIGURES = {"macs": "MACs", "params": "parameters"}
_SENTENCE = "Each bar is the channels of one layer; layers of one colour are built alike. Coloured channels are kept"


def draw_classes(
    groups: Sequence[CoupledGroup], plan: PruningPlan | None, path: Path, *, title: str, theme: Theme = LIGHT
) -> None:
    """Draw the kept share of every coupled group, in one panel for each isomorphic class, as a PNG.

    Args:
        groups: All coupled groups, in the order of the network.
        plan: The plan; without one nothing is removed.
        path: File to write.
        title: Line above the picture.
        theme: Colours of text and of removed channels.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    kept = {group.name: group.channels for group in groups}
    if plan is not None:
        kept |= {name: len(channels) for name, channels in plan.kept.items() if name in kept}
    classes: dict[str, list[CoupledGroup]] = {}
    for group in groups:
        classes.setdefault(group.signature, []).append(group)
    # A panel has a heading, its bars, and a line that counts the groups without a bar.
    rows = sum(_PANEL_GAP + min(len(members), _MAX_BARS) + (len(members) > _MAX_BARS) for members in classes.values())
    with open_figure((_WIDTH, (rows + 3.4) * _LINE_HEIGHT), dpi=DPI, theme=theme) as figure:
        axes = figure.add_axes((0.30, 0, 0.60, 1), xlim=(0, 1), ylim=(rows + 2.0, -1.4))
        axes.axis("off")
        axes.text(_LEFT_TEXT, -0.6, title, fontsize=13, fontweight="bold", va="center")
        sentence = _SENTENCE if plan is None else f"{_SENTENCE}, and grey ones are removed"
        axes.text(_LEFT_TEXT, 0.6, f"{sentence}.", fontsize=10, color=theme.muted, va="center")
        top = 2.0
        for index, members in enumerate(classes.values()):
            top = _draw_class(axes, members, kept, number=index + 1, top=top, theme=theme)
        figure.savefig(path, format="png")


def describe_cost(plan: PruningPlan) -> str:
    """Return how much of the base a plan keeps, as the title of its picture."""
    costs = [plan.achieved.get(name, {}) for name in ("base", "pruned")]
    if not all(cost.get("macs") for cost in costs):
        return "what the plan keeps"
    shares = {key: 100 * costs[1][key] / costs[0][key] for key in ("macs", "params") if costs[0].get(key)}
    return " and ".join(f"{share:.0f} % of the {_FIGURES[key]}" for key, share in shares.items()) + " are kept"


def draw_frontier(rows: Sequence[Mapping[str, Any]], files: Sequence[Path], *, best: str = "top1") -> None:
    """Draw a figure of the task, latency and parameters against MACs, each at the sizes that it was measured at.

    Args:
        rows: Figures of each size, including the base: macs, params, latency_ms, and optionally `best`.
        files: Files to write, each in the format of its suffix.
        best: Name of the task's figure, in the unit of `format_figure`.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    labels = {best: f"{COLUMNS[best]} before finetuning", "latency_ms": "latency (ms)", "params": "parameters (M)"}
    panels = {key: label for key, label in labels.items() if any(row.get(key) is not None for row in rows)}
    with open_figure((3.6 * len(panels), 3.2), dpi=DPI, layout="constrained") as figure:
        for axes, (key, label) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels.items(), strict=True):
            scale = 100 if key in PERCENTAGES else 1e-6 if key == "params" else 1
            measured = [row for row in rows if row.get(key) is not None]
            points = [(row["macs"] / 1e9, row[key] * scale) for row in measured]
            axes.plot(*zip(*points, strict=True), marker="o", color=CLASS_COLORS[0], linewidth=1.5)
            for row, point in zip(measured, points, strict=True):
                text = format_figure(key, row[key])
                axes.annotate(text, point, xytext=(0, 6), textcoords="offset points", fontsize=7, ha="center")
            axes.set_xlabel("GMACs")
            axes.set_ylabel(label)
            axes.margins(x=0.12)
            axes.set_ylim(0, 1.18 * max(max(value for _, value in points), 1e-9))
        for file in files:
            figure.savefig(file, **({"metadata": SVG_METADATA} if file.suffix == ".svg" else {}))


def _draw_class(
    axes: Any, members: list[CoupledGroup], kept: Mapping[str, int], *, number: int, top: float, theme: Theme
) -> float:
    """Draw the panel of one class, and return the line where the next panel starts."""
    color = CLASS_COLORS[(number - 1) % len(CLASS_COLORS)]
    share = sum(kept[group.name] for group in members) / sum(group.channels for group in members)
    axes.text(_LEFT_TEXT, top, f"Class {number}", fontsize=10.5, fontweight="bold", color=color, va="center")
    heading = f"{describe_class(members)}: {100 * share:.0f} % kept"
    axes.text(-0.365, top, heading, fontsize=10, va="center")
    widest = max(group.channels for group in members[:_MAX_BARS])
    for group in members[:_MAX_BARS]:
        top += 1
        axes.barh(top, group.channels / widest, height=0.72, color=theme.removed, linewidth=0)
        axes.barh(top, kept[group.name] / widest, height=0.72, color=color, linewidth=0)
        axes.text(-0.012, top, shorten(group.name, 36), fontsize=8.5, va="center", ha="right")
        figures = f"{kept[group.name]} of {group.channels}"
        axes.text(_RIGHT_TEXT, top, figures, fontsize=8.5, va="center", ha="right")
    if len(members) > _MAX_BARS:
        top += 1
        axes.text(0, top, f"+{len(members) - _MAX_BARS} more", fontsize=8.5, color=theme.muted, va="center")
    return top + _PANEL_GAP
