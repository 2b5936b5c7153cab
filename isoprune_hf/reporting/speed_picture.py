"""Draw the times of a benchmark as bars (`draw_times`), with a sentence on them (`describe_times`)."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from isoprune_hf.measuring.runtimes.registry import ENGINES
from isoprune_hf.reporting.figures import CLASS_COLORS, DPI, LIGHT, Theme, label_rows, open_figure

SPEED_PICTURE = "speed.png"
# `onnx` is the name of ONNX Runtime in folders of earlier versions.
RUNTIMES: Mapping[str, str] = {"onnx": "ONNX Runtime"} | {str(name): engine.label for name, engine in ENGINES.items()}


def draw_times(record: Mapping[str, Any], path: Path, *, title: str, theme: Theme = LIGHT) -> None:
    """Draw a bar for each case of a benchmark as a PNG: the time of the pruned model as a share of that of the base.

    A dashed line is the share that the MACs promise.

    Args:
        record: Record of `benchmark_models`.
        path: File to write.
        title: Name of the model, before the sentence.
        theme: Colours of text and of the base.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    rows = record["rows"]
    with open_figure((8, 0.42 * len(rows) + 1.3), dpi=DPI, layout="constrained", theme=theme) as figure:
        axes = figure.add_subplot(xlabel="time of the pruned model, % of the base")
        axes.set_title(f"{title}: {describe_times(record)}", loc="left", fontsize=10.5)
        places = range(len(rows))
        axes.barh(places, [100] * len(rows), height=0.7, color=theme.removed)
        axes.barh(places, [100 / row["faster"] for row in rows], height=0.7, color=CLASS_COLORS[0])
        for place, row in zip(places, rows, strict=True):
            base, pruned = (_show_time(row[name]["median"]) for name in ("base", "pruned"))
            times = f"{base} → {pruned} ms, {row['faster']:.2f}x"
            axes.text(max(100, 100 / row["faster"]) + 2, place, times, fontsize=9, va="center")
        axes.axvline(100 / record["promised"], color=theme.text, linestyle="--", linewidth=1)
        names = [f"{runtime_label(row)}, {row['dtype']}, batch {row['batch_size']}" for row in rows]
        label_rows(axes, names, bottom=len(rows) - 0.4, top=-0.6, fontsize=9)
        axes.set_xlim(0, 135 if all(row["faster"] >= 1 for row in rows) else None)
        figure.savefig(path, format="png", metadata={"Software": None})


def runtime_label(row: Mapping[str, Any]) -> str:
    """Return the name of the runtime of a row, and whether its pruned model is an exported file."""
    return RUNTIMES[row["runtime"]] + (", exported" if row.get("is_exported") else "")


def describe_times(record: Mapping[str, Any]) -> str:
    """Return a sentence on the range of the measured speed-up, beside that of the MACs."""
    factors = sorted(row["faster"] for row in record["rows"])
    measured = f"{factors[0]:.2f}x" if len(factors) == 1 else f"{factors[0]:.2f}x to {factors[-1]:.2f}x"
    return f"{measured} as fast as its base; its MACs promise {record['promised']:.2f}x (dashed)"


def _show_time(milliseconds: float) -> str:
    return f"{milliseconds:,.0f}" if milliseconds >= 100 else f"{milliseconds:.3g}"
