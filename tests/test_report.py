"""Tables and pictures."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from matplotlib.colors import to_rgb
from matplotlib.image import imread

from isoprune_hf.errors import IsoPruneError
from isoprune_hf.publishing import report
from isoprune_hf.publishing.report import draw_classes, results_table


@dataclass(frozen=True)
class FakeGroup:
    name: str
    signature: str
    channels: int
    num_heads: int = 1


@dataclass(frozen=True)
class FakePlan:
    kept: Mapping[str, tuple[int, ...]] = field(default_factory=dict)


def test_the_table_is_aligned_and_a_missing_figure_is_a_dash() -> None:
    rows = {
        "base": {"macs": 4_608_338_304, "params": 22_050_664, "top1": 0.79854, "top5": 0.9495, "loss": 0.91231},
        "pruned": {"gmacs": 1.25, "params": 123_456, "latency_ms": 3.14159},
        "finetuned": {"top1": 1.0, "top5": 0.0},
    }
    assert results_table(rows).splitlines() == [
        "model      GMACs   params  top-1 %  top-5 %    loss  latency ms",
        "base        4.61  22.05 M    79.85    94.95  0.9123           -",
        "pruned      1.25  0.123 M        -        -       -        3.14",
        "finetuned      -        -   100.00     0.00       -           -",
    ]


def test_a_table_of_nothing_is_its_heading() -> None:
    assert results_table({}) == "model  GMACs  params  top-1 %  top-5 %  loss  latency ms"


def share_of(path: Path, color: str) -> float:
    pixels = imread(path)[..., :3]
    return float((abs(pixels - to_rgb(color)).max(axis=2) < 0.01).mean())


def test_the_coloured_area_is_the_kept_share_and_the_grey_area_the_removed_one(tmp_path: Path) -> None:
    groups = [FakeGroup("stem", "a", 192), FakeGroup("block.mlp", "b", 768), FakeGroup("block.attn", "c", 192, 3)]
    plan = FakePlan({"stem": tuple(range(192)), "block.mlp": tuple(range(192)), "block.attn": (0, 1, 2)})
    draw_classes(groups, plan, tmp_path / "cut.png", title="cut")
    blue, orange, green, *_ = (share_of(tmp_path / "cut.png", color) for color in report._COLORS)
    # A quarter of the second bar stays and 1/64 of the third; the first bar, whole, is the yardstick.
    assert orange / blue == pytest.approx(0.25, abs=0.03)
    assert green / blue == pytest.approx(1 / 64, abs=0.03)
    assert share_of(tmp_path / "cut.png", report._REMOVED) / blue == pytest.approx(0.75 + 63 / 64, abs=0.03)


def test_without_a_plan_nothing_is_grey(tmp_path: Path) -> None:
    draw_classes([FakeGroup("stem", "a", 8)], None, tmp_path / "whole.png", title="whole")
    # Smoothed edges of letters may have any grey; a bar is some hundred times as large.
    assert share_of(tmp_path / "whole.png", report._REMOVED) < 0.0005
    assert [path.name for path in tmp_path.iterdir()] == ["whole.png"]


def test_a_class_shows_at_most_sixteen_bars(tmp_path: Path) -> None:
    for count in (17, 100):
        groups = [FakeGroup(f"layer.{index}", "same", 8) for index in range(count)]
        draw_classes(groups, FakePlan(), tmp_path / f"{count}.png", title="many")
    assert imread(tmp_path / "17.png").shape == imread(tmp_path / "100.png").shape


def test_a_long_name_loses_its_middle() -> None:
    assert report._shorten("abcdefghij", 10) == "abcdefghij"
    assert report._shorten("abcdefghijk", 7) == "abc…ijk"


def test_without_matplotlib_the_error_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report, "Figure", None)
    with pytest.raises(IsoPruneError, match=r"pip install isoprune-hf\[plots\]"):
        draw_classes([], None, tmp_path / "none.png", title="none")
