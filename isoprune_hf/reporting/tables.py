"""Format figures in the units of their columns, and align tables for a terminal."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

TASK_COLUMNS = {
    "top1": "top-1 %",
    "top5": "top-5 %",
    "map": "mAP %",
    "loss": "loss",
    "cosine": "cosine",
    "position_cosine": "cosine of positions",
    "knn": "k-NN %",
    "miou": "mIoU %",
    "pixel_accuracy": "pixels %",
    "same_class": "pixels as base %",
    "pixel_divergence": "divergence of pixels",
    "delta1": "delta1 %",
    "depth_difference": "difference of depths",
    "box_map": "mAP of boxes %",
    "box_map_50": "mAP50 of boxes %",
    "same_objects": "objects as base %",
    "detection_divergence": "divergence of objects",
}
COLUMNS = {
    "macs": "GMACs",
    "params": "params",
    **TASK_COLUMNS,
    "latency_ms": "latency ms",
}
PERCENTAGES = (
    "top1",
    "top5",
    "map",
    "knn",
    "miou",
    "pixel_accuracy",
    "same_class",
    "delta1",
    "box_map",
    "box_map_50",
    "same_objects",
    "ece",
    "agreement",
)  # fractions, shown in percent
_DIFFERENCES = ("pixel_divergence", "depth_difference", "detection_divergence")  # from the base
_DETAILS = {
    "ece": "calibration error %",
    "agreement": "agreement %",
    "file_mb": "MB",
    "images": "images",
    "broken": "broken",
}

Figures = dict[str, float | int | str]  # figures of one model, with the images that they were measured on
Metrics = dict[str, Figures]  # by stage


def format_figure(key: str, value: float | None, missing: str = "-") -> str:
    """Return a figure as text, in the unit of its column.

    Args:
        key: macs (shown in 10^9), params (in 10^6), top1, top5, map, knn, miou, pixel_accuracy, same_class, delta1,
            box_map, box_map_50, same_objects, ece, agreement (fractions, shown in percent), loss, cosine,
            position_cosine, pixel_divergence, depth_difference, detection_divergence, latency_ms, file_mb, images or
            broken.
        value: The figure, or None if it was not measured.
        missing: Text for a figure that was not measured.
    """
    if value is None:
        return missing
    if key in ("macs", "params"):
        value = value / (1e9 if key == "macs" else 1e6)
        return f"{value:.2f}" if value >= 1 else f"{value:.3g}"
    if key in PERCENTAGES:
        return f"{100 * value:.2f}"
    if key in ("loss", "cosine", "position_cosine", *_DIFFERENCES):
        return f"{value:.4f}"
    shown = {"latency_ms": f"{value:.2f}", "file_mb": f"{value:.3g}"}
    return shown.get(key, f"{value:,}")


def results_table(rows: Mapping[str, Mapping[str, Any]], *, title: str = "model", has_details: bool = False) -> str:
    """Return the figures of several models as a table for a terminal, with the columns that were measured.

    Below it is a line on the sample of the images, if it is one.

    Args:
        rows: Model -> its figures: macs (or gmacs), params, top1, top5, map, knn, ece (fractions), loss, cosine,
            position_cosine, those of pixels, latency_ms, images, broken. A missing figure is shown as a dash.
        title: Heading of the first column.
        has_details: Show the calibration error, the agreement, the size of files and the numbers of images, too.
    """
    figures = {name: dict(row) for name, row in rows.items()}
    for row in figures.values():
        if row.get("macs") is None and row.get("gmacs") is not None:
            row["macs"] = row["gmacs"] * 1e9
    columns = {
        key: heading
        for key, heading in {**COLUMNS, **(_DETAILS if has_details else {})}.items()
        if any(row.get(key) is not None for row in figures.values())
    }
    table = [[title, *columns.values()]]
    for name, row in figures.items():
        cells = {key: format_figure(key, row.get(key)) for key in columns}
        if row.get("params") is not None:
            cells["params"] += " M"
        table.append([name, *cells.values()])
    sample = describe_sample(rows.values())
    is_classified = any("top1" in row or "map" in row for row in figures.values())
    named = "Accuracy and loss" if is_classified else "Figures"
    return align_columns(table) + (f"\n{named}{sample}" if sample else "")


def are_measured(rows: Iterable[Mapping[str, Any]]) -> bool:
    """Return whether there is a figure of a task among the figures of several models."""
    return any(not TASK_COLUMNS.keys().isdisjoint(row) for row in rows)


def describe_sample(rows: Iterable[Mapping[str, Any]]) -> str:
    """Return on how many images of the split figures were measured, if it was not on all of them, else nothing."""
    texts = {_describe_part(row) for row in rows if "split_images" in row}
    return f" ({' and '.join(sorted(texts))})" if texts else ""


def _describe_part(figures: Mapping[str, Any]) -> str:
    images, total, seed = figures["images"], figures["split_images"], figures.get("holdout_seed")
    if seed is not None:
        return f"{images:,} of {total:,} training images, held out by seed {seed:,}"
    return f"sample of {images:,} of {total:,} images"


def on_same_images(metrics: Metrics, images: Mapping[str, Any]) -> Metrics:
    """Return the figures that were measured on given images, by stage; figures of other images are left out.

    Args:
        metrics: Figures of an evaluation by stage.
        images: Describes the images as figures do: `data` (a fingerprint), `images` and `split_images`. Figures of
            earlier versions have no fingerprint, and only the numbers are compared.
    """
    return {name: row for name, row in metrics.items() if _same_images(row, images)}


def _same_images(first: Mapping[str, Any], second: Mapping[str, Any]) -> bool:
    is_known = all("data" in row for row in (first, second))
    if is_known:
        return bool(first["data"] == second["data"])
    numbers = [(row.get("images"), row.get("split_images")) for row in (first, second)]
    return numbers[0] == numbers[1] or any(images is None for images, _ in numbers)


def align_columns(table: Sequence[Sequence[str]]) -> str:
    """Return the rows of a table as aligned lines: the first column to the left, all others to the right."""
    widths = [max(len(row[index]) for row in table) for index in range(len(table[0]))]
    lines = []
    for row in table:
        cells = [
            cell.rjust(width) if index else cell.ljust(width)
            for index, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)


def shorten(text: str, length: int) -> str:
    """Return a text of at most `length` characters; a longer text loses its middle."""
    half = (length - 1) // 2
    return text if len(text) <= length else f"{text[:half]}…{text[-half:]}"
