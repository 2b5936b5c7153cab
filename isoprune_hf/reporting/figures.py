"""The style that all pictures share: `open_figure`, colours, and text of an SVG element.

matplotlib is imported when a picture is drawn.
"""

import io
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from isoprune_hf.extras import require_package
from isoprune_hf.pruning.deciding.alternatives import ALTERNATIVES

CLASS_COLORS = ("#3b6fb6", "#d9772b", "#3f9b6c", "#8d5fb0", "#c0504d", "#2a9fa8", "#a8842c", "#d0679d")
# Colours that colour-blind readers can distinguish, on white and on black; the first ones are those of alternatives.
_PLAN_COLORS = ("#e08214", "#9c5bb5", "#2f81c7", "#2da44e", "#c2407c")
REMOVED_COLOR = "#e3e6ea"
TEXT_COLOR = "#1f2328"
MUTED_COLOR = "#6a737d"
DPI = 160


@dataclass(frozen=True)
class Theme:
    """Colours that depend on the page around a picture; those of classes and plans are the same on all."""

    text: str
    muted: str
    removed: str
    background: str


LIGHT = Theme(TEXT_COLOR, MUTED_COLOR, REMOVED_COLOR, "white")
DARK = Theme("#e6edf3", "#9198a1", "#3d444d", "none")  # transparent: dark pages differ
# The entries that would make the file of a picture differ between two runs.
SVG_METADATA = dict.fromkeys(("Date", "Creator", "Format", "Type"))
_STYLE = {
    "svg.fonttype": "none",  # text stays text
    "text.parse_math": False,  # so does a title with dollar signs
    "svg.hashsalt": "isoprune",
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
}


def _colors(theme: Theme) -> dict[str, str]:
    texts = ("text.color", "axes.labelcolor", "xtick.color", "ytick.color", "axes.titlecolor")
    return {**dict.fromkeys(texts, theme.text), "axes.edgecolor": theme.muted, "axes.facecolor": "none"}


def check_plotting() -> None:
    """Check before any work that pictures can be drawn.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    require_package("matplotlib", "drawing")


@contextmanager
def open_figure(
    size: tuple[float, float], *, layout: str | None = None, dpi: float | None = None, theme: Theme = LIGHT
) -> Iterator[Any]:
    """Open a matplotlib figure in the shared style; the settings of matplotlib are restored on exit.

    Args:
        size: Width and height in inches.
        layout: Layout engine of matplotlib.
        dpi: Resolution of a bitmap.
        theme: Colours of text, axes and background.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    matplotlib = require_package("matplotlib", "drawing")
    figure_class = require_package("matplotlib.figure", "drawing").Figure
    with matplotlib.rc_context({**_STYLE, **_colors(theme)}):
        yield figure_class(figsize=size, layout=layout, dpi=dpi, facecolor=theme.background)


def plan_colors(plans: Iterable[str]) -> dict[str, str]:
    """Return the colour of each plan; an alternative has its own colour whichever others are compared with it."""
    fixed = dict(zip(ALTERNATIVES, _PLAN_COLORS, strict=False))
    others = [plan for plan in plans if plan not in fixed]
    last = {plan: _PLAN_COLORS[(len(fixed) + number) % len(_PLAN_COLORS)] for number, plan in enumerate(others)}
    return {plan: fixed.get(plan) or last[plan] for plan in plans}


def label_rows(axes: Any, labels: list[str], *, bottom: float, top: float, fontsize: float | None = None) -> None:
    """Label the rows 0, 1, 2, ... of a picture from top to bottom, without tick marks.

    Args:
        axes: Axes of matplotlib.
        labels: One label for each row.
        bottom: Lower end of the axis, in rows.
        top: Upper end of the axis, in rows.
        fontsize: Size of the labels in points.
    """
    axes.set_yticks(range(len(labels)), labels)
    axes.set_ylim(bottom, top)
    axes.tick_params(axis="y", length=0)
    if fontsize is not None:
        axes.tick_params(axis="y", labelsize=fontsize)


def add_legend(figure: Any, *, columns: int, handle_length: float, column_spacing: float | None = None) -> None:
    """Add a legend above the axes."""
    figure.legend(
        loc="outside upper center",
        ncols=columns,
        columnspacing=column_spacing,
        frameon=False,
        fontsize=9,
        handlelength=handle_length,
    )


def svg_text(figure: Any, name: str) -> str:
    """Return a figure as an SVG element for an HTML page, without background and in the page's own colours.

    Text, axes and removed channels have the variables `--text`, `--muted` and `--removed` of the page, so that they
    follow its dark mode.

    Args:
        figure: Figure of matplotlib.
        name: Name that no other picture of the page has; it makes the ids of the element unique.
    """
    text = io.StringIO()
    figure.savefig(text, format="svg", metadata=SVG_METADATA, facecolor="none")
    svg = text.getvalue()
    for variable, color in (("text", LIGHT.text), ("muted", LIGHT.muted), ("removed", LIGHT.removed)):
        svg = svg.replace(color, f"var(--{variable})")
    # HTML does not allow the XML prolog.
    return re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{name}-", svg[svg.index("<svg") :])
