"""Pictures in files, measured by their pixels."""

import sys
from pathlib import Path

import pytest
from matplotlib.colors import to_rgb
from matplotlib.image import imread

from isoprune_hf.errors import MissingExtraError
from isoprune_hf.pruning.groups import CoupledGroup
from isoprune_hf.pruning.plan import PruningPlan
from isoprune_hf.reporting import figures
from isoprune_hf.reporting.pictures import describe_cost, draw_classes, draw_frontier


def make_group(name: str, signature: str, channels: int, num_heads: int = 0) -> CoupledGroup:
    return CoupledGroup(name, signature, channels, (), num_heads)


def make_plan(**kept: tuple[int, ...]) -> PruningPlan:
    return PruningPlan(kept=kept, heads={})


def share_of(path: Path, color: str) -> float:
    pixels = imread(path)[..., :3]
    return float((abs(pixels - to_rgb(color)).max(axis=2) < 0.01).mean())


def test_coloured_area_is_the_kept_share(tmp_path: Path) -> None:
    groups = [make_group("stem", "a", 192), make_group("block.mlp", "b", 768), make_group("block.attn", "c", 192, 3)]
    plan = make_plan(**{"stem": tuple(range(192)), "block.mlp": tuple(range(192)), "block.attn": (0, 1, 2)})
    draw_classes(groups, plan, tmp_path / "cut.png", title="cut")
    blue, orange, green, *_ = (share_of(tmp_path / "cut.png", color) for color in figures.CLASS_COLORS)
    # A quarter of the second bar is kept and 1/64 of the third; the first bar is complete.
    assert orange / blue == pytest.approx(0.25, abs=0.03)
    assert green / blue == pytest.approx(1 / 64, abs=0.03)
    assert share_of(tmp_path / "cut.png", figures.REMOVED_COLOR) / blue == pytest.approx(0.75 + 63 / 64, abs=0.03)


def test_title_has_the_kept_costs() -> None:
    achieved = {"base": {"macs": 200, "params": 50}, "pruned": {"macs": 100, "params": 30}}
    plan = PruningPlan({}, {}, achieved=achieved)
    assert describe_cost(plan) == "50 % of the MACs and 60 % of the parameters are kept"
    assert describe_cost(make_plan()) == "what the plan keeps"


def test_colours_of_classes_are_those_of_light(tmp_path: Path) -> None:
    groups = [make_group("stem", "a", 8), make_group("fc", "b", 8)]
    for name, theme in (("light", figures.LIGHT), ("dark", figures.DARK)):
        draw_classes(groups, make_plan(fc=(0, 1)), tmp_path / f"{name}.png", title="x", theme=theme)
    for color in figures.CLASS_COLORS[:2]:
        shares = [share_of(tmp_path / f"{name}.png", color) for name in ("light", "dark")]
        assert shares[0] == pytest.approx(shares[1], rel=0.1) and shares[0] > 0.005
    assert share_of(tmp_path / "dark.png", figures.DARK.removed) > 0.005


def test_nothing_is_grey_without_a_plan(tmp_path: Path) -> None:
    draw_classes([make_group("stem", "a", 8)], None, tmp_path / "whole.png", title="whole")
    # Antialiased letters contain some grey; a bar is about a hundred times as large.
    assert share_of(tmp_path / "whole.png", figures.REMOVED_COLOR) < 0.0005
    assert [path.name for path in tmp_path.iterdir()] == ["whole.png"]


def test_class_shows_at_most_sixteen_bars(tmp_path: Path) -> None:
    for count in (17, 100):
        groups = [make_group(f"layer.{index}", "same", 8) for index in range(count)]
        draw_classes(groups, make_plan(), tmp_path / f"{count}.png", title="many")
    assert imread(tmp_path / "17.png").shape == imread(tmp_path / "100.png").shape


def test_missing_matplotlib_is_named_with_its_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(MissingExtraError, match=r"matplotlib.*isoprune-hf\[publish\]"):
        draw_classes([], None, tmp_path / "none.png", title="none")


def test_frontier_shows_measured_figures_only(tmp_path: Path) -> None:
    rows = [{"macs": 2e9, "params": 3e6, "latency_ms": 4.0}, {"macs": 1e9, "params": 2e6, "latency_ms": 3.0}]
    draw_frontier(rows, [tmp_path / "plain.svg", tmp_path / "plain.png"])
    draw_frontier([{**row, "top1": 0.875} for row in rows], [tmp_path / "measured.svg"])
    plain, measured = ((tmp_path / f"{name}.svg").read_text() for name in ("plain", "measured"))
    assert "latency (ms)" in plain and "parameters (M)" in plain and "top-1" not in plain
    assert "top-1 % before finetuning" in measured and measured.count("87.50") >= 2
    assert (tmp_path / "plain.png").read_bytes().startswith(b"\x89PNG")
