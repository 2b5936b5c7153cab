"""Format text for a terminal: colours, escapes, progress bars and spelling suggestions in error messages."""

import difflib
import os
import re
import sys
from collections.abc import Iterable
from typing import Literal, TextIO, TypeVar

from tqdm import tqdm

Value = TypeVar("Value")
Look = Literal["red", "green"]
_CODES: dict[Look, str] = {"red": "31;1", "green": "32"}

_OWN_CODES = re.compile("(" + "|".join(rf"\033\[{code}m" for code in ("0", *_CODES.values())) + ")")


def printable(text: str) -> str:
    """Return text with every sign that a terminal would obey or hide as its escape, such as `\\x1b`.

    Line ends, tabs and the colours of `paint` stay.
    """
    parts = _OWN_CODES.split(text)
    return "".join(part if number % 2 else _escape(part) for number, part in enumerate(parts))


def _escape(text: str) -> str:
    return "".join(sign if sign.isprintable() or sign in "\n\t" else ascii(sign)[1:-1] for sign in text)


def paint(text: str, look: Look, stream: TextIO) -> str:
    """Return `text` in colour if `stream` is a terminal, unless NO_COLOR (no-color.org) or TERM=dumb is set."""
    is_plain = os.environ.get("NO_COLOR") or os.environ.get("TERM") == "dumb" or not stream.isatty()
    return text if is_plain else f"\033[{_CODES[look]}m{text}\033[0m"


def has_bars() -> bool:
    """Return whether progress bars are shown: on a terminal, unless TQDM_DISABLE is set."""
    return sys.stderr.isatty() and not os.environ.get("TQDM_DISABLE")


def with_bar(
    values: Iterable[Value], text: str, unit: str, *, rank: int = 0, initial: int = 0, total: int | None = None
) -> Iterable[Value]:
    """Iterate over values; the terminal of rank 0 shows a bar with the time left.

    Args:
        values: What to iterate over.
        text: Name of the work.
        unit: Name of one value.
        rank: Rank of this process.
        initial: Number of values that an earlier process has finished.
        total: Number of all values with those; by default the length of `values`, if it has one.
    """
    is_shown = rank == 0 and has_bars()
    bar: Iterable[Value] = tqdm(values, text, total, leave=False, unit=unit, initial=initial, disable=not is_shown)
    return bar


def suggest(name: str, known: Iterable[str], *, limit: int = 3) -> str:
    """Return the end of an error message that names the closest known names, or an empty text if none is close."""
    near = difflib.get_close_matches(name, list(known), n=limit)
    return f"; did you mean {', '.join(near)}?" if near else ""
