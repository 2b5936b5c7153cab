"""Results as people read them: a table for the terminal, and a picture of what was cut in each isomorphic class."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from isoprune_hf.errors import IsoPruneError

try:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
except ImportError:
    Figure = None

_COLORS = ("#3b6fb6", "#d9772b", "#3f9b6c", "#8d5fb0", "#c0504d", "#2a9fa8", "#a8842c", "#d0679d")
_REMOVED, _TEXT, _MUTED = "#e3e6ea", "#1f2328", "#6a737d"
_MOST_BARS = 16
_ROW = 0.26  # inches for one bar or one line of text
_WIDTH, _DPI = 10.0, 160


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


def format_figure(key: str, value: float | None, missing: str = "-") -> str:
    """Write a figure in the unit its column names.

    Args:
        key: macs (to 10^9), params (to 10^6), top1, top5 (fractions, to percent), loss, latency_ms, file_mb or images.
        value: The figure in its own unit, or nothing where it was not measured.
        missing: Stands for a figure that was not measured.
    """
    if value is None:
        return missing
    if key in ("macs", "params"):
        value = value / (1e9 if key == "macs" else 1e6)
        return f"{value:.2f}" if value >= 1 else f"{value:.3g}"
    if key in ("top1", "top5"):
        return f"{100 * value:.2f}"
    shown = {"loss": f"{value:.4f}", "latency_ms": f"{value:.2f}", "file_mb": f"{value:.3g}"}
    return shown.get(key, f"{value:,}")


def results_table(rows: Mapping[str, Mapping[str, Any]]) -> str:
    """Align the figures of base, pruned and finetuned model for a terminal.

    Args:
        rows: Figures by model: macs (or gmacs), params, top1, top5 (fractions), loss, latency_ms.
            A missing one becomes a dash.
    """
    columns = {"macs": "GMACs", "params": "params", "top1": "top-1 %", "top5": "top-5 %", "loss": "loss"}
    columns["latency_ms"] = "latency ms"
    table = [["model", *columns.values()]]
    for name, row in rows.items():
        figures = dict(row)
        if figures.get("macs") is None and figures.get("gmacs") is not None:
            figures["macs"] = figures["gmacs"] * 1e9
        cells = {key: format_figure(key, figures.get(key)) for key in columns}
        if figures.get("params") is not None:
            cells["params"] += " M"
        table.append([name, *cells.values()])
    return align_columns(table)


def align_columns(table: Sequence[Sequence[str]]) -> str:
    """Write rows under each other, the first column flush left and the others flush right."""
    widths = [max(len(line[index]) for line in table) for index in range(len(table[0]))]
    lines = [
        "  ".join(cell.rjust(width) if index else cell.ljust(width) for index, (cell, width) in enumerate(pairs))
        for pairs in (list(zip(line, widths, strict=True)) for line in table)
    ]
    return "\n".join(line.rstrip() for line in lines)


def draw_classes(groups: Sequence[Group], plan: Plan | None, path: Path, *, title: str) -> None:
    """Draw how much every coupled group keeps, one panel for each isomorphic class, as a PNG.

    Args:
        groups: All coupled groups, in the order of the network.
        plan: The cut; without one nothing is removed.
        path: File to write.
        title: Line above the picture.

    Raises:
        IsoPruneError: matplotlib is not installed.
    """
    if Figure is None:
        raise IsoPruneError("drawing needs matplotlib, which is not installed: pip install isoprune-hf[plots]")
    kept = {group.name: group.channels for group in groups}
    if plan is not None:
        kept |= {name: len(channels) for name, channels in plan.kept.items() if name in kept}
    classes: dict[str, list[Group]] = {}
    for group in groups:
        classes.setdefault(group.signature, []).append(group)
    # A panel has one line of heading, its bars, perhaps a line for the bars left out, and a gap of 0.9 lines.
    rows = sum(1.9 + min(len(members), _MOST_BARS) + (len(members) > _MOST_BARS) for members in classes.values())
    figure = Figure(figsize=(_WIDTH, (rows + 2.4) * _ROW), dpi=_DPI, facecolor="white")
    FigureCanvasAgg(figure)
    axes = figure.add_axes((0.30, 0, 0.60, 1), xlim=(0, 1), ylim=(rows + 1.0, -1.4))
    axes.axis("off")
    axes.text(-0.475, -0.6, title, fontsize=13, fontweight="bold", color=_TEXT, va="center")
    legend = "coloured: kept    grey: removed"
    axes.text(1.14, -0.6, legend, fontsize=9, color=_MUTED, va="center", ha="right")
    top = 1.0
    for index, members in enumerate(classes.values()):
        top = _draw_class(axes, members, kept, number=index + 1, top=top)
    temporary = path.with_name(f".{path.name}.tmp")
    figure.savefig(temporary, format="png")
    temporary.replace(path)


def _draw_class(axes: Any, members: list[Group], kept: Mapping[str, int], *, number: int, top: float) -> float:
    color = _COLORS[(number - 1) % len(_COLORS)]
    total, left = sum(group.channels for group in members), sum(kept[group.name] for group in members)
    heads = f", {members[0].num_heads} heads" if members[0].num_heads > 1 else ""
    count = f"{len(members)} group{'s' if len(members) > 1 else ''}{heads}"
    axes.text(-0.475, top, f"Class {number}", fontsize=10.5, fontweight="bold", color=color, va="center")
    axes.text(-0.365, top, f"{count}, {100 * left / total:.0f} % kept", fontsize=10, color=_TEXT, va="center")
    axes.text(1.14, top, _shorten(members[0].signature, 60), fontsize=8, color=_MUTED, va="center", ha="right")
    widest = max(group.channels for group in members[:_MOST_BARS])
    for group in members[:_MOST_BARS]:
        top += 1
        axes.barh(top, group.channels / widest, height=0.72, color=_REMOVED, linewidth=0)
        axes.barh(top, kept[group.name] / widest, height=0.72, color=color, linewidth=0)
        axes.text(-0.012, top, _shorten(group.name, 36), fontsize=8.5, color=_TEXT, va="center", ha="right")
        axes.text(
            1.14, top, f"{kept[group.name]}/{group.channels}", fontsize=8.5, color=_TEXT, va="center", ha="right"
        )
    if len(members) > _MOST_BARS:
        top += 1
        axes.text(0, top, f"+{len(members) - _MOST_BARS} more", fontsize=8.5, color=_MUTED, va="center")
    return top + 1.9


def _shorten(text: str, length: int) -> str:
    half = (length - 1) // 2
    return text if len(text) <= length else f"{text[:half]}…{text[-half:]}"
