"""Format text for a terminal: colours, progress bars and spelling suggestions in error messages."""

import difflib
import os
import sys
from collections.abc import Iterable
from typing import Literal, TextIO

Look = Literal["bold", "red", "green"]
_CODES: dict[Look, str] = {"bold": "1", "red": "31;1", "green": "32"}


def paint(text: str, look: Look, stream: TextIO) -> str:
    """Return `text` in colour if `stream` is a terminal, unless NO_COLOR (no-color.org) or TERM=dumb is set."""
    is_plain = os.environ.get("NO_COLOR") or os.environ.get("TERM") == "dumb" or not stream.isatty()
    return text if is_plain else f"\033[{_CODES[look]}m{text}\033[0m"


def has_bars() -> bool:
    """Return whether progress bars are shown: on a terminal, unless TQDM_DISABLE is set."""
    return sys.stderr.isatty() and not os.environ.get("TQDM_DISABLE")


def suggest(name: str, known: Iterable[str], *, limit: int = 3) -> str:
    """Return the end of an error message that names the closest known names, or an empty text if none is close."""
    near = difflib.get_close_matches(name, list(known), n=limit)
    return f"; did you mean {', '.join(near)}?" if near else ""
