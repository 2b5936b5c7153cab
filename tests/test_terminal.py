"""Colours and spelling suggestions."""

import io

import pytest

from isoprune_hf.terminal import paint, suggest


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
