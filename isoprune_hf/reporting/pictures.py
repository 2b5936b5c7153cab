"""Pictures by matplotlib, which is imported when one is drawn: what plans keep, scores, and what sizes cost.

Those of the page are SVG texts that can stand in HTML side by side: text stays text, and no name is used twice.
"""

import io
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from isoprune_hf.extras import require_package
from isoprune_hf.reporting.tables import format_figure, shorten

_COLORS = ("#3b6fb6", "#d9772b", "#3f9b6c", "#8d5fb0", "#c0504d", "#2a9fa8", "#a8842c", "#d0679d")
# Those of the alternatives, told apart by the colour-blind too; a fifth starts anew.
_PLAN_COLORS = ("#e08214", "#7b3294", "#1b6ca8", "#1a9850", "#4d4d4d")
_REMOVED, _TEXT, _MUTED = "#e3e6ea", "#1f2328", "#6a737d"
_MOST_BARS = 16
_ROW = 0.26  # inches for one bar or one line of text
_WIDTH, _DPI = 10.0, 160
_PLOT_WIDTH = 4.9  # inches: fills the screen of a phone, and half of a page
_BINS = 30


class Group(Protocol):
    """What a picture needs of a coupled group."""

    @property
    def name(self) -> str: ...
    @property
    def signature(self) -> str: ...
    @property
    def channels(self) -> int: ...
    @property
    def num_heads(self) -> int: ...


class Plan(Protocol):
    """What a picture needs of a plan: the channels that stay in each group."""

    @property
    def kept(self) -> Mapping[str, Sequence[int]]: ...


def check_plotting() -> None:
    """Check, before any work, that pictures can be drawn.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    require_package("matplotlib", "drawing")


@contextmanager
def _figure(**options: Any) -> Iterator[Any]:
    """Give a figure of our look; matplotlib's own settings are as before when it is done."""
    check_plotting()
    matplotlib, module = (require_package(name, "drawing") for name in ("matplotlib", "matplotlib.figure"))
    look = {"svg.fonttype": "none", "svg.hashsalt": "isoprune", "font.size": 10, "axes.spines.top": False}
    look |= {"axes.spines.right": False, "text.color": _TEXT, "axes.labelcolor": _TEXT, "xtick.color": _TEXT}
    look |= {"ytick.color": _TEXT, "axes.edgecolor": _MUTED}
    with matplotlib.rc_context(look):
        yield module.Figure(facecolor="white", **options)


def draw_classes(groups: Sequence[Group], plan: Plan | None, path: Path, *, title: str) -> None:
    """Draw how much every coupled group keeps, one panel for each isomorphic class, as a PNG.

    Args:
        groups: All coupled groups, in the order of the network.
        plan: The cut; without one nothing is removed.
        path: File to write.
        title: Line above the picture.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    kept = {group.name: group.channels for group in groups}
    if plan is not None:
        kept |= {name: len(channels) for name, channels in plan.kept.items() if name in kept}
    classes: dict[str, list[Group]] = {}
    for group in groups:
        classes.setdefault(group.signature, []).append(group)
    # A panel has one line of heading, its bars, perhaps a line for the bars left out, and a gap of 0.9 lines.
    rows = sum(1.9 + min(len(members), _MOST_BARS) + (len(members) > _MOST_BARS) for members in classes.values())
    with _figure(figsize=(_WIDTH, (rows + 2.4) * _ROW), dpi=_DPI) as figure:
        axes = figure.add_axes((0.30, 0, 0.60, 1), xlim=(0, 1), ylim=(rows + 1.0, -1.4))
        axes.axis("off")
        axes.text(-0.475, -0.6, title, fontsize=13, fontweight="bold", color=_TEXT, va="center")
        legend = "coloured: kept    grey: removed"
        axes.text(1.14, -0.6, legend, fontsize=9, color=_MUTED, va="center", ha="right")
        top = 1.0
        for index, members in enumerate(classes.values()):
            top = _draw_class(axes, members, kept, number=index + 1, top=top)
        figure.savefig(path, format="png")


def _draw_class(axes: Any, members: list[Group], kept: Mapping[str, int], *, number: int, top: float) -> float:
    color = _COLORS[(number - 1) % len(_COLORS)]
    total, left = sum(group.channels for group in members), sum(kept[group.name] for group in members)
    heads = f", {members[0].num_heads} heads" if members[0].num_heads > 1 else ""
    count = f"{len(members)} group{'s' if len(members) > 1 else ''}{heads}"
    axes.text(-0.475, top, f"Class {number}", fontsize=10.5, fontweight="bold", color=color, va="center")
    axes.text(-0.365, top, f"{count}, {100 * left / total:.0f} % kept", fontsize=10, color=_TEXT, va="center")
    axes.text(1.14, top, shorten(members[0].signature, 60), fontsize=8, color=_MUTED, va="center", ha="right")
    widest = max(group.channels for group in members[:_MOST_BARS])
    for group in members[:_MOST_BARS]:
        top += 1
        axes.barh(top, group.channels / widest, height=0.72, color=_REMOVED, linewidth=0)
        axes.barh(top, kept[group.name] / widest, height=0.72, color=color, linewidth=0)
        axes.text(-0.012, top, shorten(group.name, 36), fontsize=8.5, color=_TEXT, va="center", ha="right")
        axes.text(
            1.14, top, f"{kept[group.name]}/{group.channels}", fontsize=8.5, color=_TEXT, va="center", ha="right"
        )
    if len(members) > _MOST_BARS:
        top += 1
        axes.text(0, top, f"+{len(members) - _MOST_BARS} more", fontsize=8.5, color=_MUTED, va="center")
    return top + 1.9


def draw_bars(
    rows: Mapping[str, tuple[float, Sequence[float]]], plans: Sequence[str], *, label: str, name: str
) -> str:
    """Draw, for each row, a bar before the cut and in front of it one for each plan.

    Args:
        rows: Row -> (its value before, its values by plan).
        plans: Names of the plans.
        label: Text below the axis.
        name: Unlike that of any other picture of the page.

    Returns:
        The text of an SVG element.
    """
    height = 0.075 * max(len(plans), 1) + 0.13
    with _figure(figsize=(_PLOT_WIDTH, height * len(rows) + 0.75), layout="constrained") as figure:
        axes = figure.subplots()
        places = np.arange(len(rows))
        axes.barh(places, [base for base, _ in rows.values()], height=0.84, color=_REMOVED, label="before")
        thick = 0.72 / max(len(plans), 1)
        for number, plan in enumerate(plans):
            offset = (number - (len(plans) - 1) / 2) * thick
            values = [by_plan[number] for _, by_plan in rows.values()]
            axes.barh(places + offset, values, height=0.85 * thick, color=color_of(number), label=plan)
        axes.set_yticks(places, [shorten(row, 27) for row in rows], fontsize=9, parse_math=False)
        axes.set_ylim(len(rows) - 0.4, -0.6)
        axes.set_xlabel(label)
        axes.tick_params(axis="y", length=0)
        figure.legend(
            loc="outside upper center", ncols=5, columnspacing=1.2, frameon=False, fontsize=9, handlelength=1.0
        )
        return _to_svg(figure, name)


def draw_scores(scores: np.ndarray, kept: Mapping[str, np.ndarray], *, name: str) -> str:
    """Draw a histogram of the scores of one class, and what each plan keeps of it.

    Args:
        scores: All scores of the class, (channels,); those that are 0 are left out.
        kept: Plan -> the scores of the channels that stay.
        name: Unlike that of any other picture of the page.

    Returns:
        The text of an SVG element.
    """
    with _figure(figsize=(_PLOT_WIDTH, 2.5), layout="constrained") as figure:
        axes = figure.subplots()
        edges = _scale(axes, [scores])
        axes.hist(scores[scores > 0], bins=edges, color=_REMOVED, label="all channels")
        for number, (plan, values) in enumerate(kept.items()):
            options = {"histtype": "step", "color": color_of(number), "linewidth": 1.3, "label": f"kept: {plan}"}
            axes.hist(values[values > 0], bins=edges, **options)
        axes.set_ylabel("channels")
        figure.legend(loc="outside upper center", ncols=2, frameon=False, fontsize=9, handlelength=1.2)
        return _to_svg(figure, name)


def draw_scales(scores: Mapping[str, np.ndarray], *, name: str) -> str:
    """Draw the scores of all classes on one axis: what a cut that compares them with each other would see.

    Args:
        scores: Class -> its scores, (channels,).
        name: Unlike that of any other picture of the page.

    Returns:
        The text of an SVG element.
    """
    with _figure(figsize=(_PLOT_WIDTH, 0.42 * len(scores) + 0.7), layout="constrained") as figure:
        axes = figure.subplots()
        edges = _scale(axes, list(scores.values()))
        for number, (label, values) in enumerate(scores.items()):
            counts, _ = np.histogram(values[values > 0], bins=edges)
            heights = 0.85 * counts / max(counts.max(), 1)
            color = _COLORS[number % len(_COLORS)]
            axes.stairs(number - heights, edges, baseline=number, fill=True, color=color, label=label)
        axes.set_yticks(np.arange(len(scores)), list(scores), parse_math=False)
        axes.set_ylim(len(scores) - 0.8, -1)
        axes.tick_params(axis="y", length=0)
        return _to_svg(figure, name)


def draw_frontier(rows: Sequence[Mapping[str, Any]], files: Sequence[Path]) -> None:
    """Draw accuracy, latency and parameters against MACs, as far as they were measured.

    Args:
        rows: Figures of each size, the base among them: macs, params, latency_ms, and perhaps top1 (a fraction).
        files: Files to write, each in the format that its name ends with.
    """
    labels = {"top1": "top-1 % before finetuning", "latency_ms": "latency (ms)", "params": "parameters (M)"}
    panels = {key: label for key, label in labels.items() if all(row.get(key) is not None for row in rows)}
    with _figure(figsize=(3.6 * len(panels), 3.2), dpi=_DPI, layout="constrained") as figure:
        for axes, (key, label) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels.items(), strict=True):
            scale = {"top1": 100, "params": 1e-6}.get(key, 1)
            points = [(row["macs"] / 1e9, row[key] * scale) for row in rows]
            axes.plot(*zip(*points, strict=True), marker="o", color=_COLORS[0], linewidth=1.5)
            for row, point in zip(rows, points, strict=True):
                text = format_figure(key, row[key])
                axes.annotate(text, point, xytext=(0, 6), textcoords="offset points", fontsize=7, ha="center")
            axes.set_xlabel("GMACs")
            axes.set_ylabel(label)
            axes.margins(x=0.12)
            axes.set_ylim(0, 1.18 * max(max(value for _, value in points), 1e-9))
        for file in files:
            figure.savefig(file, **({"metadata": _NO_METADATA} if file.suffix == ".svg" else {}))


def color_of(number: int) -> str:
    """The colour of a plan by its place among those that are compared."""
    return _PLAN_COLORS[number % len(_PLAN_COLORS)]


_NO_METADATA = dict.fromkeys(("Date", "Creator", "Format", "Type"))


def _scale(axes: Any, scores: Sequence[np.ndarray]) -> np.ndarray:
    """Set the axis of scores, logarithmic where they span more than a decade; returns the edges of the bins."""
    positive = np.concatenate([values[values > 0] for values in scores])
    low, high = (float(positive.min()), float(positive.max())) if positive.size else (0.5, 1.5)
    axes.set_xlabel("score")
    if high <= 10 * low:
        margin = 1e-6 * high if high > low else 0.1 * high
        return np.linspace(low - margin, high + margin, _BINS + 1)
    axes.set_xscale("log")
    return np.geomspace(low * (1 - 1e-6), high * (1 + 1e-6), _BINS + 1)


def _to_svg(figure: Any, name: str) -> str:
    text = io.StringIO()
    figure.savefig(text, format="svg", metadata=_NO_METADATA)
    svg = text.getvalue()
    # Several of them in one page must not share ids; the prolog has no place inside HTML.
    return re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{name}-", svg[svg.index("<svg") :])
