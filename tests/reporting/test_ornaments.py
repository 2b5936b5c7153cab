"""A part that a result can do without never ends the work."""

import logging
from pathlib import Path

import pytest

from isoprune_hf.errors import CheckpointError
from isoprune_hf.reporting.ornaments import ornament
from isoprune_hf.reporting.widths import draw_widths


@pytest.mark.parametrize(
    "error", [ValueError("a\nb"), KeyError("x"), MemoryError(), CheckpointError("no"), OSError(28, "full")]
)
def test_any_error_is_one_warning(error: Exception, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING), ornament("the picture"):
        raise error
    (record,) = caplog.records
    assert record.getMessage().startswith(f"the picture failed ({type(error).__name__}: ") and "\n" not in record.msg


def test_ends_of_the_process_pass() -> None:
    for end in (KeyboardInterrupt(), SystemExit(3)):
        with pytest.raises(type(end)), ornament("the picture"):
            raise end


@pytest.mark.parametrize("title", ["cost_$5_to_$6", "$", r"\frac{1", "ein {Titel} % & ^", "\N{SNOWMAN} \u202e"])
def test_any_title_can_be_drawn(title: str, tmp_path: Path) -> None:
    draw_widths({"a": (4, 2), "b": (8, 8)}, tmp_path / "widths.png", title=title)
    assert (tmp_path / "widths.png").read_bytes().startswith(b"\x89PNG")
