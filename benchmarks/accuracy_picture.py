"""Draw top-1 accuracy against MACs from the results of `real_accuracy.py`, for light and for dark pages.

    python benchmarks/accuracy_picture.py --results benchmarks/results/*_accuracy.jsonl --output docs/accuracy

A net has a panel with the cells of one split; a dashed line shows what they reach after finetuning.
"""

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from isoprune_hf.reporting.figures import CLASS_COLORS, DARK, DPI, LIGHT, Theme, open_figure

NETS = {
    "lite0": "EfficientNet-Lite0, ImageNet weights",
    "lite1": "EfficientNet-Lite1, ImageNet weights",
    "lite2": "EfficientNet-Lite2, ImageNet weights",
    "resnet20": "ResNet-20, CIFAR-10",
}
# Method of `real_accuracy.py` -> its name in the picture and its colour; other methods are not drawn.
METHODS = {
    "best": ("isoprune_hf", CLASS_COLORS[0]),
    "corp": ("CORP, our implementation", CLASS_COLORS[2]),
    "tp_iso_bn": ("torch-pruning, new BatchNorm statistics", CLASS_COLORS[1]),
    "tp_iso": ("torch-pruning", CLASS_COLORS[4]),
}
Point = tuple[float, float, float]  # percent of the MACs, top-1 in percent, its standard error


def select_rows(
    rows: Sequence[Mapping[str, Any]], nets: Sequence[str], seed: int, images: Sequence[int]
) -> list[Mapping[str, Any]]:
    """Return the rows of these nets, of one split and of these numbers of calibration images."""
    return [row for row in rows if row["net"] in nets and row["seed"] == seed and row["images"] in images]


def read_points(rows: Sequence[Mapping[str, Any]], net: str, *, finetuned: bool = False) -> dict[str, list[Point]]:
    """Return method -> its points by MACs, the dense net among those of `best`; a repeated cell counts as last.

    Args:
        rows: Rows of the results.
        net: Name of the net.
        finetuned: The points after finetuning, of the cells that were finetuned.
    """
    cells = {(row["method"], row["budget"]): row for row in rows if row["net"] == net}
    points: dict[str, list[Point]] = {}
    for (method, _), row in sorted(cells.items(), key=lambda cell: cell[0][1]):
        figures = row.get("after") if finetuned else row
        if method in METHODS and figures is not None:
            points.setdefault(method, []).append((100 * row["share"], figures["top1"], figures["error"]))
    if "best" in points:
        dense = next(row["dense"] for row in rows if row["net"] == net)
        points["best"].append((100.0, dense["top1"], dense["error"]))
    return points


def draw_accuracy(rows: Sequence[Mapping[str, Any]], path: Path, *, theme: Theme = LIGHT) -> None:
    """Draw a panel for each net as a PNG.

    Args:
        rows: Rows of the results.
        path: File to write.
        theme: Colours.
    """
    nets = [net for net in NETS if any(row["net"] == net for row in rows)]
    with open_figure((1.6 + 5.0 * len(nets), 4.0), dpi=DPI, layout="constrained", theme=theme) as figure:
        for axes, net in zip(figure.subplots(1, len(nets), squeeze=False)[0], nets, strict=True):
            epochs = max(row.get("epochs", 0) for row in rows if row["net"] == net)
            points_of = read_points(rows, net)
            finetuned = read_points(rows, net, finetuned=True)
            _draw_lines(axes, points_of, theme, finetuned)
            _draw_lines(axes, finetuned, theme, dashed=True)
            said = f"dashed: {epochs} epochs after the cut" if epochs else "no training after the cut"
            axes.set_title(f"{NETS[net]}, {said}", fontsize=10.5)
            axes.set_xlabel("MACs, % of the dense network")
            axes.set_ylabel("top-1 %")
            axes.set_xlim(min(share for points in points_of.values() for share, _, _ in points) - 3, 105)
            axes.set_ylim(-9, 100)
        labels = figure.axes[0].get_legend_handles_labels()
        figure.legend(*labels, frameon=False, loc="outside lower center", ncols=2, fontsize=9)
        figure.savefig(path, format="png", metadata={"Software": None})


def _draw_lines(
    axes: Any,
    points_of: Mapping[str, list[Point]],
    theme: Theme,
    above: Mapping[str, list[Point]] | None = None,
    *,
    dashed: bool = False,
) -> None:
    """Draw a line for each method, with its figures above or, where other points lie above, below.

    Dashed lines have no label, and only those of isoprune_hf have figures, since the points of several methods meet.
    """
    taken = {round(share) for share, _, _ in (above or {}).get("best", ())}
    for method in (method for method in METHODS if method in points_of):
        name, color = METHODS[method]
        shares, values, errors = zip(*points_of[method], strict=True)
        style: dict[str, Any] = {"linestyle": "--"} if dashed else {"label": name}
        axes.errorbar(shares, values, errors, marker="o", color=color, capsize=2, linewidth=1.8, **style)
        for share, value in zip(shares, values, strict=True) if method == "best" or not dashed else ():
            is_below = method == "tp_iso" or (bool(taken) and method != "best") or round(share) in taken
            place = {"xytext": (0, -16) if is_below else (-6, 9), "textcoords": "offset points", "ha": "center"}
            if not (dashed and share == 100):  # the dense net is on both lines
                axes.annotate(f"{value:.1f}", (share, value), color=theme.text, fontsize=9, **place)


def main() -> None:
    """Read the results and write both pictures."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--results", nargs="+", type=Path, required=True)
    parser.add_argument("--output", required=True, help="Beginning of both names: OUTPUT-light.png, OUTPUT-dark.png.")
    parser.add_argument("--nets", nargs="+", choices=NETS, default=["lite0", "resnet20"])
    parser.add_argument("--seed", type=int, default=0, help="Number of the split.")
    parser.add_argument("--images", nargs="+", type=int, default=[200, 256], help="Calibration images.")
    arguments = parser.parse_args()
    lines = [line for file in arguments.results for line in file.read_text(encoding="utf-8").splitlines()]
    rows = select_rows([json.loads(line) for line in lines], arguments.nets, arguments.seed, arguments.images)
    for name, theme in (("light", LIGHT), ("dark", DARK)):
        draw_accuracy(rows, Path(f"{arguments.output}-{name}.png"), theme=theme)


if __name__ == "__main__":
    main()
