"""Times of a benchmark as bars."""

from pathlib import Path
from typing import Any

import pytest
from matplotlib.colors import to_rgb
from matplotlib.image import imread

from isoprune_hf.measuring.cases import record_case
from isoprune_hf.measuring.timing import Passes, Timing
from isoprune_hf.reporting.figures import CLASS_COLORS, REMOVED_COLOR
from isoprune_hf.reporting.speed_picture import describe_times, draw_times


def times_of(**medians: float) -> Timing:
    return Timing({name: Passes((time,) * 5, (time,) * 5) for name, time in medians.items()}, None)


def record_of(*pruned: float) -> dict[str, Any]:
    rows = [record_case("eager", "fp32", 1, times_of(base=10.0, pruned=time), promised=2.0) for time in pruned]
    return {"promised": 2.0, "rows": rows}


def test_sentence_has_the_range_of_the_times() -> None:
    assert describe_times(record_of(8.0)) == "1.25x as fast as its base; its MACs promise 2.00x (dashed)"
    assert describe_times(record_of(5.0, 8.0)).startswith("1.25x to 2.00x as fast")


def test_coloured_part_of_a_bar_is_its_time(tmp_path: Path) -> None:
    draw_times(record_of(2.5), tmp_path / "speed.png", title="net")
    pixels = imread(tmp_path / "speed.png")[..., :3]
    blue, grey = (float((abs(pixels - to_rgb(c)).max(axis=2) < 0.02).sum()) for c in (CLASS_COLORS[0], REMOVED_COLOR))
    assert blue / (blue + grey) == pytest.approx(0.25, abs=0.02)
