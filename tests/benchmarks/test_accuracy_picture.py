"""The picture of accuracy against MACs shows what was measured."""

from pathlib import Path
from typing import Any

import pytest
from accuracy_picture import draw_accuracy, main, read_points, select_rows
from matplotlib.image import imread

from isoprune_hf.reporting.figures import DARK


def row(method: str, budget: float, top1: float, net: str = "lite0") -> dict[str, Any]:
    dense = {"top1": 80.0, "error": 2.0}
    return {
        "net": net,
        "method": method,
        "budget": budget,
        "share": budget,
        "top1": top1,
        "error": 1.0,
        "dense": dense,
    }


def test_points_are_those_of_the_results() -> None:
    rows = [row("best", 0.75, 70.0), row("best", 0.5, 3.0), row("best", 0.5, 50.0), row("tp_iso", 0.5, 1.0)]
    rows += [row("other", 0.5, 99.0), row("best", 0.5, 98.0, "lite1")]
    assert read_points(rows, "lite0") == {
        "best": [(50.0, 50.0, 1.0), (75.0, 70.0, 1.0), (100.0, 80.0, 2.0)],
        "tp_iso": [(50.0, 1.0, 1.0)],
    }


def test_points_after_finetuning_are_of_finetuned_cells() -> None:
    rows = [row("best", 0.75, 70.0), {**row("best", 0.5, 50.0), "after": {"top1": 60.0, "error": 0.5}}]
    assert read_points(rows, "lite0", finetuned=True) == {"best": [(50.0, 60.0, 0.5), (100.0, 80.0, 2.0)]}


def test_one_split_is_selected() -> None:
    kept = {**row("best", 0.5, 50.0), "seed": 0, "images": 200}
    rows = [kept, {**kept, "seed": 1}, {**kept, "images": 64}, {**kept, "net": "lite2"}]
    assert select_rows(rows, ["lite0", "lite1"], 0, [200]) == [kept]


@pytest.mark.benchmarks
def test_dark_picture_has_no_background(tmp_path: Path) -> None:
    draw_accuracy([row("best", 0.5, 50.0)], tmp_path / "dark.png", theme=DARK)
    draw_accuracy([row("best", 0.5, 50.0)], tmp_path / "light.png")
    dark, light = imread(tmp_path / "dark.png"), imread(tmp_path / "light.png")
    assert dark[0, 0, 3] == 0 and light[0, 0].tolist() == [1, 1, 1, 1]


def test_recorded_results_are_drawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The command beside the picture of the README; rows of methods that are not drawn have other entries."""
    results = sorted(map(str, (Path(__file__).parents[2] / "benchmarks" / "results").glob("*_accuracy.jsonl")))
    nets = ["lite0", "lite1", "resnet20"]
    output = str(tmp_path / "accuracy")
    monkeypatch.setattr(
        "sys.argv", ["accuracy_picture.py", "--output", output, "--nets", *nets, "--results", *results]
    )
    main()
    light, dark = (imread(f"{output}-{name}.png") for name in ("light", "dark"))
    assert light.shape == dark.shape and light.shape[1] > 3 * light.shape[0]  # three panels side by side
