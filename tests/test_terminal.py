"""Colours, bars, times and spelling suggestions."""

import io
import itertools
import logging
import os
import sys
import time
import weakref

import pytest
from tqdm import tqdm

from isoprune_hf.terminal import BesideBars, format_seconds, paint, suggest, with_bar, with_progress


class Terminal(io.StringIO):
    """A stream that is a terminal."""

    def isatty(self) -> bool:
        return True


def test_only_willing_terminal_gets_colours(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    assert paint("ok  ", "green", Terminal()) == "\033[32mok  \033[0m"
    assert paint("ok  ", "green", io.StringIO()) == "ok  "
    monkeypatch.setenv("NO_COLOR", "1")
    assert paint("ok  ", "green", Terminal()) == "ok  "


def test_suggestions_are_close_and_limited() -> None:
    known = ["resnet18", "resnet34", "resnet50", "vit_tiny"]
    assert suggest("resnet19", known, limit=1) == "; did you mean resnet18?"
    assert suggest("resnet", known).count(",") == 2
    assert suggest("swin", known) == ""


def test_bar_counts_all_values(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TQDM_DISABLE", raising=False)
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setattr(tqdm, "_instances", weakref.WeakSet(), raising=False)  # bars that other tests left open
    for stream, rank, is_shown in ((Terminal(), 0, True), (io.StringIO(), 0, False), (Terminal(), 1, False)):
        monkeypatch.setattr(sys, "stderr", stream)
        assert [*with_bar(iter("abc"), "score", "batch", rank=rank, initial=4, total=7)] == ["a", "b", "c"]
        assert ("score" in stream.getvalue() and "4/7" in stream.getvalue()) == is_shown
        assert bool(stream.getvalue()) == is_shown


@pytest.mark.parametrize(
    ("seconds", "stream", "rank", "lines"),
    [
        (2.5, io.StringIO, 0, ["score: 2.5 s"]),
        (1.9, io.StringIO, 0, []),
        (2.5, io.StringIO, 1, []),
        (2.5, Terminal, 0, []),
    ],
)
def test_long_steps_have_one_line_without_bars(
    seconds: float,
    stream: type[io.StringIO],
    rank: int,
    lines: list[str],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.delenv("TQDM_DISABLE", raising=False)
    monkeypatch.setattr(tqdm, "_instances", weakref.WeakSet(), raising=False)  # bars that other tests left open
    monkeypatch.setattr(sys, "stderr", stream())
    monkeypatch.setattr(logging, "raiseExceptions", False)  # of handlers whose streams other tests have closed
    clock = itertools.count()
    monkeypatch.setattr(time, "monotonic", lambda: seconds * next(clock))
    with caplog.at_level(logging.INFO, "isoprune_hf"):
        assert [*with_progress("abc", "score", "batch", rank=rank)] == ["a", "b", "c"]
    assert [record.getMessage() for record in caplog.records] == lines
    assert stream is Terminal or sys.stderr.getvalue() == ""


def test_bar_is_shown_without_known_width(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TQDM_DISABLE", raising=False)
    monkeypatch.delenv("COLUMNS", raising=False)
    monkeypatch.setattr(tqdm, "_instances", weakref.WeakSet(), raising=False)
    controller, terminal = os.openpty()  # whose size is 0 x 0
    with open(terminal, "w", encoding="utf-8") as stream:
        monkeypatch.setattr(sys, "stderr", stream)
        assert [*with_bar("abc", "score", "batch")] == ["a", "b", "c"]
        shown = os.read(controller, 4096).decode()
    os.close(controller)
    assert "score" in shown and "0/3" in shown


def test_log_line_clears_the_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TQDM_DISABLE", raising=False)
    monkeypatch.setattr(tqdm, "_instances", weakref.WeakSet(), raising=False)
    terminal = Terminal()
    monkeypatch.setattr(sys, "stdout", terminal)
    monkeypatch.setattr(sys, "stderr", terminal)
    for _ in with_bar("a", "score", "batch"):
        BesideBars(terminal).emit(logging.makeLogRecord({"msg": "a line"}))
    before = terminal.getvalue().partition("a line\n")[0].split("\r")[-1]
    assert before == ""


def test_times_are_formatted_for_people() -> None:
    said = {0.42: "0.4 s", 42: "42 s", 750: "12 min", 12600: "3.5 h", 181440: "2.1 days"}
    assert {seconds: format_seconds(seconds) for seconds in said} == said
