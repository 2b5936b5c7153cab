"""Show text and progress: colours, escapes, bars, times, and spelling suggestions in error messages."""

import difflib
import logging
import os
import re
import shutil
import sys
import time
from collections.abc import Iterable, Iterator
from typing import Literal, TextIO, TypeVar

from tqdm import tqdm

logger = logging.getLogger(__name__)  # not accelerate's, which needs an accelerator

Value = TypeVar("Value")
Look = Literal["red", "green"]
_CODES: dict[Look, str] = {"red": "31;1", "green": "32"}
_SHORT_SECONDS = 2  # a step that takes longer has a line

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
    columns, lines = _size() if is_shown else (None, None)
    bar: Iterable[Value] = tqdm(
        values,
        text,
        total,
        leave=False,
        ncols=columns,
        nrows=lines,
        unit=unit,
        initial=initial,
        disable=not is_shown,
    )
    return bar


def with_progress(
    values: Iterable[Value], text: str, unit: str, *, rank: int = 0, initial: int = 0, total: int | None = None
) -> Iterator[Value]:
    """Iterate over values as `with_bar` does; without bars rank 0 logs the time of a step above two seconds."""
    start = time.monotonic()
    yield from with_bar(values, text, unit, rank=rank, initial=initial, total=total)
    seconds = time.monotonic() - start
    if rank == 0 and seconds > _SHORT_SECONDS and not has_bars():
        logger.info(f"{text}: {format_seconds(seconds)}")


class BesideBars(logging.StreamHandler[TextIO]):
    """Writes log lines above the bars of the terminal, which it clears meanwhile."""

    def emit(self, record: logging.LogRecord) -> None:
        """Write a line."""
        with tqdm.external_write_mode(file=self.stream):
            super().emit(record)


def _size() -> tuple[int, int] | tuple[None, None]:
    """Return columns and lines for a bar where the terminal says 0 x 0, as under `expect`, which would hide it."""
    try:
        found = os.get_terminal_size(sys.stderr.fileno())
    except OSError:  # not a terminal of the system
        return None, None
    size = shutil.get_terminal_size()
    return (None, None) if all(found) else (size.columns - 1, size.lines)


def format_seconds(seconds: float) -> str:
    """Format a time for people: 0.4 s, 42 s, 12 min, 3.5 h, 2.1 days."""
    if seconds < 100:
        return f"{seconds:.{0 if seconds >= 9.95 else 1}f} s"
    for unit, size, below in (("min", 60, 100), ("h", 3600, 48)):
        if seconds < below * size:
            return f"{seconds / size:.{0 if unit == 'min' else 1}f} {unit}"
    return f"{seconds / 86400:.1f} days"


def suggest(name: str, known: Iterable[str], *, limit: int = 3) -> str:
    """Return the end of an error message that names the closest known names, or an empty text if none is close."""
    near = difflib.get_close_matches(name, list(known), n=limit)
    return f"; did you mean {', '.join(near)}?" if near else ""
