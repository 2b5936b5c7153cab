"""The plots of the inspection page, as SVG elements: `draw_bars`, `draw_scores` and `draw_scales`."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from isoprune_hf.reporting.figures import (
    CLASS_COLORS,
    REMOVED_COLOR,
    add_legend,
    label_rows,
    open_figure,
    plan_colors,
    svg_text,
)
from isoprune_hf.reporting.tables import shorten

_PLOT_WIDTH = 4.9  # inches: the screen of a phone, or half of a page
_BINS = 30
_LABEL_LENGTH = 27  # characters of a row label


def draw_bars(
    rows: Mapping[str, tuple[float, Sequence[float]]], plans: Sequence[str], *, label: str, name: str
) -> str:
    """Draw for each row a bar before pruning, and in front of it a thinner bar for each plan.

    Args:
        rows: Row -> (value before pruning, value of each plan).
        plans: Names of the plans.
        label: Label of the axis.
        name: Name that no other picture of the page has.

    Returns:
        Text of an SVG element.
    """
    colors = plan_colors(plans)
    height = 0.075 * max(len(plans), 1) + 0.13
    with open_figure((_PLOT_WIDTH, height * len(rows) + 0.75), layout="constrained") as figure:
        axes = figure.subplots()
        places = np.arange(len(rows))
        axes.barh(places, [base for base, _ in rows.values()], height=0.84, color=REMOVED_COLOR, label="before")
        thickness = 0.72 / max(len(plans), 1)
        for number, plan in enumerate(plans):
            offset = (number - (len(plans) - 1) / 2) * thickness
            values = [by_plan[number] for _, by_plan in rows.values()]
            axes.barh(places + offset, values, height=0.85 * thickness, color=colors[plan], label=plan)
        labels = [shorten(row, _LABEL_LENGTH) for row in rows]
        label_rows(axes, labels, bottom=len(rows) - 0.4, top=-0.6, fontsize=9)
        axes.set_xlabel(label)
        add_legend(figure, columns=5, column_spacing=1.2, handle_length=1.0)
        return svg_text(figure, name)


def draw_scores(scores: np.ndarray, kept: Mapping[str, np.ndarray], *, name: str) -> str:
    """Draw a histogram of the scores of one class, and of the scores that each plan keeps.

    Args:
        scores: All scores of the class, (channels,); zeros are not drawn.
        kept: Plan -> scores of the kept channels.
        name: Name that no other picture of the page has.

    Returns:
        Text of an SVG element.
    """
    colors = plan_colors(kept)
    with open_figure((_PLOT_WIDTH, 2.5), layout="constrained") as figure:
        axes = figure.subplots()
        edges = _set_score_axis(axes, [scores])
        axes.hist(scores[scores > 0], bins=edges, color=REMOVED_COLOR, label="all channels")
        for plan, values in kept.items():
            axes.hist(
                values[values > 0],
                bins=edges,
                histtype="step",
                color=colors[plan],
                linewidth=1.3,
                label=f"kept: {plan}",
            )
        axes.set_ylabel("channels")
        add_legend(figure, columns=2, handle_length=1.2)
        return svg_text(figure, name)


def draw_scales(scores: Mapping[str, np.ndarray], *, name: str) -> str:
    """Draw histograms of the scores of all classes on one axis, as a global ranking would compare them.

    Args:
        scores: Class -> its scores, (channels,).
        name: Name that no other picture of the page has.

    Returns:
        Text of an SVG element.
    """
    with open_figure((_PLOT_WIDTH, 0.42 * len(scores) + 0.7), layout="constrained") as figure:
        axes = figure.subplots()
        edges = _set_score_axis(axes, list(scores.values()))
        for number, (label, values) in enumerate(scores.items()):
            counts, _ = np.histogram(values[values > 0], bins=edges)
            heights = 0.85 * counts / max(counts.max(), 1)
            color = CLASS_COLORS[number % len(CLASS_COLORS)]
            axes.stairs(number - heights, edges, baseline=number, fill=True, color=color, label=label)
        label_rows(axes, list(scores), bottom=len(scores) - 0.8, top=-1)
        return svg_text(figure, name)


def _set_score_axis(axes: Any, scores: Sequence[np.ndarray]) -> np.ndarray:
    """Set up the axis of scores, logarithmic if they span more than a factor of 10.

    Returns:
        Edges of the bins.
    """
    positive = np.concatenate([values[values > 0] for values in scores])
    low, high = (float(positive.min()), float(positive.max())) if positive.size else (0.5, 1.5)
    axes.set_xlabel("score")
    if high <= 10 * low:
        margin = 1e-6 * high if high > low else 0.1 * high
        return np.linspace(low - margin, high + margin, _BINS + 1)
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter(lambda score, _: f"{score:g}")  # texts are no formulas here, see `figures`
    axes.xaxis.set_minor_formatter(lambda score, _: "")
    return np.geomspace(low * (1 - 1e-6), high * (1 + 1e-6), _BINS + 1)
