"""The style that all pictures share: `open_figure`, colours, and text of an SVG element.

matplotlib is imported when a picture is drawn.
"""

import io
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from isoprune_hf.extras import require_package

CLASS_COLORS = ("#3b6fb6", "#d9772b", "#3f9b6c", "#8d5fb0", "#c0504d", "#2a9fa8", "#a8842c", "#d0679d")
# Colours that colour-blind readers can distinguish; a sixth plan repeats the first one.
_PLAN_COLORS = ("#e08214", "#7b3294", "#1b6ca8", "#1a9850", "#4d4d4d")
REMOVED_COLOR = "#e3e6ea"
TEXT_COLOR = "#1f2328"
MUTED_COLOR = "#6a737d"
DPI = 160
# The entries that would make the file of a picture differ between two runs.
SVG_METADATA = dict.fromkeys(("Date", "Creator", "Format", "Type"))
_STYLE = {
    "svg.fonttype": "none",  # text stays text
    "text.parse_math": False,  # so does a title with dollar signs
    "svg.hashsalt": "isoprune",
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "text.color": TEXT_COLOR,
    "axes.labelcolor": TEXT_COLOR,
    "xtick.color": TEXT_COLOR,
    "ytick.color": TEXT_COLOR,
    "axes.edgecolor": MUTED_COLOR,
}


def check_plotting() -> None:
    """Check before any work that pictures can be drawn.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    require_package("matplotlib", "drawing")


@contextmanager
def open_figure(size: tuple[float, float], *, layout: str | None = None, dpi: float | None = None) -> Iterator[Any]:
    """Open a matplotlib figure in the shared style; the settings of matplotlib are restored on exit.

    Args:
        size: Width and height in inches.
        layout: Layout engine of matplotlib.
        dpi: Resolution of a bitmap.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    matplotlib = require_package("matplotlib", "drawing")
    figure_class = require_package("matplotlib.figure", "drawing").Figure
    with matplotlib.rc_context(_STYLE):
        yield figure_class(figsize=size, layout=layout, dpi=dpi, facecolor="white")


def plan_color(number: int) -> str:
    """Return the colour of a plan by its position among those that are compared."""
    return _PLAN_COLORS[number % len(_PLAN_COLORS)]


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
    """Return a figure as an SVG element for an HTML page.

    Args:
        figure: Figure of matplotlib.
        name: Name that no other picture of the page has; it makes the ids of the element unique.
    """
    text = io.StringIO()
    figure.savefig(text, format="svg", metadata=SVG_METADATA)
    svg = text.getvalue()
    # HTML does not allow the XML prolog.
    return re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{name}-", svg[svg.index("<svg") :])
