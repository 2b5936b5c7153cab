"""Figures as people read them: in the units of their columns, and in tables for the terminal."""

from collections.abc import Mapping, Sequence
from typing import Any


def format_figure(key: str, value: float | None, missing: str = "-") -> str:
    """Write a figure in the unit its column names.

    Args:
        key: macs (to 10^9), params (to 10^6), top1, top5 (fractions, to percent), loss, ece, latency_ms,
            file_mb, images or broken.
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
    shown = {"loss": f"{value:.4f}", "ece": f"{value:.4f}", "latency_ms": f"{value:.2f}", "file_mb": f"{value:.3g}"}
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


def shorten(text: str, length: int) -> str:
    """Take the middle out of a text that is longer than `length`."""
    half = (length - 1) // 2
    return text if len(text) <= length else f"{text[:half]}…{text[-half:]}"
