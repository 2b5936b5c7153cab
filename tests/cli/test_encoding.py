"""Terminals whose encoding lacks some characters."""

import io
import sys

import pytest

from isoprune_hf.__main__ import main
from isoprune_hf.cli import main as command_line


@pytest.mark.parametrize("encoding", ["ascii", "cp1252", "utf-8"])
def test_missing_characters_are_printed_as_escapes(encoding: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def answer(_: object) -> int:
        for stream in (sys.stdout, sys.stderr):
            print("64 \N{RIGHTWARDS ARROW} 32", file=stream)
        return 0

    streams = [io.TextIOWrapper(io.BytesIO(), encoding=encoding, newline="\n") for _ in range(2)]
    monkeypatch.setattr(sys, "stdout", streams[0])
    monkeypatch.setattr(sys, "stderr", streams[1])
    monkeypatch.setattr(command_line, "main", answer)
    assert main(["prune"]) == 0
    for stream in streams:
        stream.flush()
        arrow = "\N{RIGHTWARDS ARROW}" if encoding == "utf-8" else r"\u2192"
        assert stream.buffer.getvalue().decode(encoding) == f"64 {arrow} 32\n"
