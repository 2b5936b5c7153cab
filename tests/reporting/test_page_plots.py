"""Plots of the inspection page, measured by the paths of the SVG."""

import re
from xml.etree import ElementTree

import matplotlib
import numpy as np
import pytest

from isoprune_hf.reporting.figures import plan_colors
from isoprune_hf.reporting.page_plots import draw_bars, draw_scales, draw_scores

REMOVED = "var(--removed)"


def lengths(svg: str, color: str) -> list[float]:
    """Return the widths of the filled bars of a colour, read from the paths of an SVG."""
    found = re.findall(rf'<path d="M ([^"]+?)z\s*" clip-path="[^"]*" style="fill: {re.escape(color)}"', svg)
    corners = [[float(number) for number in re.findall(r"-?\d+\.?\d*", path)] for path in found]
    return [max(points[::2]) - min(points[::2]) for points in corners]


def test_length_of_bar_is_its_value() -> None:
    rows = {"first": (100.0, [25.0, 100.0]), "second": (50.0, [50.0, 0.0])}
    svg = draw_bars(rows, ["a", "b"], label="channels", name="test")
    grey = lengths(svg, REMOVED)
    assert grey[1] / grey[0] == pytest.approx(0.5, abs=1e-3)
    colors = plan_colors(["a", "b"])
    assert [length / grey[0] for length in lengths(svg, colors["a"])] == pytest.approx([0.25, 0.5], abs=1e-3)
    assert [length / grey[0] for length in lengths(svg, colors["b"])] == pytest.approx([1.0, 0.0], abs=1e-3)


def test_texts_are_escaped_and_not_parsed_as_formulas() -> None:
    svg = draw_bars({"<b>&$x_1$": (1.0, [1.0])}, ["plan"], label="channels", name="test")
    texts = [element.text for element in ElementTree.fromstring(svg).iter("{http://www.w3.org/2000/svg}text")]
    assert "<b>&$x_1$" in texts


def heights(svg: str) -> list[float]:
    """Return the heights of the grey bars of a histogram."""
    found = re.findall(rf'<path d="M ([^"]+?)z\s*" clip-path="[^"]*" style="fill: {re.escape(REMOVED)}"', svg)
    corners = [[float(number) for number in re.findall(r"-?\d+\.?\d*", path)] for path in found]
    return [max(points[1::2]) - min(points[1::2]) for points in corners]


@pytest.mark.parametrize("scale", [1.0, 1e6])
def test_histogram_counts_every_positive_score(scale: float) -> None:
    scores = np.array([0.0, 0.0, 1.0, 1.0, 1.0, 1.0, 2.0 * scale, 2.0 * scale])
    bars = [height for height in heights(draw_scores(scores, {"plan": scores[2:4]}, name="test")) if height > 0]
    assert [bar / max(bars) for bar in bars] == pytest.approx([1.0, 0.5], abs=1e-3)


@pytest.mark.parametrize("scores", [np.zeros(3), np.ones(3)])
def test_equal_scores_can_be_drawn(scores: np.ndarray) -> None:
    for svg in (draw_scores(scores, {}, name="one"), draw_scales({"class 1": scores}, name="two")):
        ElementTree.fromstring(svg)


def test_matplotlib_settings_are_restored() -> None:
    before = dict(matplotlib.rcParams)
    draw_bars({"row": (1.0, [])}, [], label="channels", name="test")
    assert dict(matplotlib.rcParams) == before


def test_alternative_has_one_colour_on_all_pages() -> None:
    every = plan_colors(["local", "global", "isomorphic", "knapsack", "plan"])
    assert len(set(every.values())) == 5
    for names in (["isomorphic"], ["plan", "knapsack", "local"], ["mine", "isomorphic"]):
        assert all(plan_colors(names)[name] == every[name] for name in names if name != "mine")


def test_pictures_follow_the_colours_of_the_page() -> None:
    svg = draw_bars({"row": (1.0, [0.5])}, ["plan"], label="channels", name="test")
    assert {"var(--text)", "var(--muted)", "var(--removed)"} <= set(re.findall(r"var\(--\w+\)", svg))
    assert not re.search(r"#(?:ffffff|000000|1f2328)", svg)


def test_ticks_of_a_logarithmic_axis_are_numbers() -> None:
    svg = draw_scales({"class 1": np.array([1e-5, 1e-2])}, name="test")
    texts = [element.text for element in ElementTree.fromstring(svg).iter("{http://www.w3.org/2000/svg}text")]
    assert {"1e-05", "0.0001", "0.001", "0.01"} <= set(texts)
    assert not [text for text in texts if "$" in (text or "")]
