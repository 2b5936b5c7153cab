"""Pictures, measured by what was drawn."""

import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from xml.etree import ElementTree

import matplotlib
import numpy as np
import pytest
from matplotlib.colors import to_rgb
from matplotlib.image import imread

from isoprune_hf.errors import MissingExtraError
from isoprune_hf.reporting import pictures
from isoprune_hf.reporting.pictures import color_of, draw_bars, draw_classes, draw_frontier, draw_scales, draw_scores


@dataclass(frozen=True)
class FakeGroup:
    name: str
    signature: str
    channels: int
    num_heads: int = 1


@dataclass(frozen=True)
class FakePlan:
    kept: Mapping[str, tuple[int, ...]] = field(default_factory=dict)


def share_of(path: Path, color: str) -> float:
    pixels = imread(path)[..., :3]
    return float((abs(pixels - to_rgb(color)).max(axis=2) < 0.01).mean())


def test_the_coloured_area_is_the_kept_share_and_the_grey_area_the_removed_one(tmp_path: Path) -> None:
    groups = [FakeGroup("stem", "a", 192), FakeGroup("block.mlp", "b", 768), FakeGroup("block.attn", "c", 192, 3)]
    plan = FakePlan({"stem": tuple(range(192)), "block.mlp": tuple(range(192)), "block.attn": (0, 1, 2)})
    draw_classes(groups, plan, tmp_path / "cut.png", title="cut")
    blue, orange, green, *_ = (share_of(tmp_path / "cut.png", color) for color in pictures._COLORS)
    # A quarter of the second bar stays and 1/64 of the third; the first bar, whole, is the yardstick.
    assert orange / blue == pytest.approx(0.25, abs=0.03)
    assert green / blue == pytest.approx(1 / 64, abs=0.03)
    assert share_of(tmp_path / "cut.png", pictures._REMOVED) / blue == pytest.approx(0.75 + 63 / 64, abs=0.03)


def test_without_a_plan_nothing_is_grey(tmp_path: Path) -> None:
    draw_classes([FakeGroup("stem", "a", 8)], None, tmp_path / "whole.png", title="whole")
    # Smoothed edges of letters may have any grey; a bar is some hundred times as large.
    assert share_of(tmp_path / "whole.png", pictures._REMOVED) < 0.0005
    assert [path.name for path in tmp_path.iterdir()] == ["whole.png"]


def test_a_class_shows_at_most_sixteen_bars(tmp_path: Path) -> None:
    for count in (17, 100):
        groups = [FakeGroup(f"layer.{index}", "same", 8) for index in range(count)]
        draw_classes(groups, FakePlan(), tmp_path / f"{count}.png", title="many")
    assert imread(tmp_path / "17.png").shape == imread(tmp_path / "100.png").shape


def test_without_matplotlib_the_error_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(MissingExtraError, match=r"pip install isoprune-hf\[publish\]"):
        draw_classes([], None, tmp_path / "none.png", title="none")


def lengths(svg: str, color: str) -> list[float]:
    """Widths of the filled bars of a colour, from the paths in an SVG."""
    found = re.findall(rf'<path d="M ([^"]+?)z\s*" clip-path="[^"]*" style="fill: {color}"', svg)
    corners = [[float(number) for number in re.findall(r"-?\d+\.?\d*", path)] for path in found]
    return [max(points[::2]) - min(points[::2]) for points in corners]


def test_a_bar_is_as_long_as_its_value() -> None:
    rows = {"first": (100.0, [25.0, 100.0]), "second": (50.0, [50.0, 0.0])}
    svg = draw_bars(rows, ["a", "b"], label="channels", name="test")
    grey = lengths(svg, pictures._REMOVED)
    assert grey[1] / grey[0] == pytest.approx(0.5, abs=1e-3)
    assert [length / grey[0] for length in lengths(svg, color_of(0))] == pytest.approx([0.25, 0.5], abs=1e-3)
    assert [length / grey[0] for length in lengths(svg, color_of(1))] == pytest.approx([1.0, 0.0], abs=1e-3)


def test_texts_are_escaped_and_taken_for_no_formulas() -> None:
    svg = draw_bars({"<b>&$x_1$": (1.0, [1.0])}, ["plan"], label="channels", name="test")
    texts = [element.text for element in ElementTree.fromstring(svg).iter("{http://www.w3.org/2000/svg}text")]
    assert "<b>&$x_1$" in texts


def heights(svg: str) -> list[float]:
    """Heights of the grey bars of a histogram."""
    found = re.findall(rf'<path d="M ([^"]+?)z\s*" clip-path="[^"]*" style="fill: {pictures._REMOVED}"', svg)
    corners = [[float(number) for number in re.findall(r"-?\d+\.?\d*", path)] for path in found]
    return [max(points[1::2]) - min(points[1::2]) for points in corners]


@pytest.mark.parametrize("scale", [1.0, 1e6])
def test_a_histogram_counts_every_score_above_0(scale: float) -> None:
    scores = np.array([0.0, 0.0, 1.0, 1.0, 1.0, 1.0, 2.0 * scale, 2.0 * scale])
    bars = [height for height in heights(draw_scores(scores, {"plan": scores[2:4]}, name="test")) if height > 0]
    assert [bar / max(bars) for bar in bars] == pytest.approx([1.0, 0.5], abs=1e-3)


@pytest.mark.parametrize("scores", [np.zeros(3), np.ones(3)])
def test_scores_without_a_spread_can_be_drawn(scores: np.ndarray) -> None:
    for svg in (draw_scores(scores, {}, name="one"), draw_scales({"class 1": scores}, name="two")):
        ElementTree.fromstring(svg)


def test_the_settings_of_matplotlib_are_left_as_they_were() -> None:
    before = dict(matplotlib.rcParams)
    draw_bars({"row": (1.0, [])}, [], label="channels", name="test")
    assert dict(matplotlib.rcParams) == before


def test_a_frontier_shows_what_was_measured(tmp_path: Path) -> None:
    rows = [{"macs": 2e9, "params": 3e6, "latency_ms": 4.0}, {"macs": 1e9, "params": 2e6, "latency_ms": 3.0}]
    draw_frontier(rows, [tmp_path / "plain.svg", tmp_path / "plain.png"])
    draw_frontier([{**row, "top1": 0.875} for row in rows], [tmp_path / "measured.svg"])
    plain, measured = ((tmp_path / f"{name}.svg").read_text() for name in ("plain", "measured"))
    assert "latency (ms)" in plain and "parameters (M)" in plain and "top-1" not in plain
    assert "top-1 % before finetuning" in measured and measured.count("87.50") >= 2
    assert (tmp_path / "plain.png").read_bytes().startswith(b"\x89PNG")
