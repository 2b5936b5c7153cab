"""Colours and spelling suggestions."""

import io
import sys
import weakref

import pytest
from tqdm import tqdm

from isoprune_hf.terminal import paint, suggest, with_bar


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
