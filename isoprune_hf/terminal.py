"""What only a terminal gets: colours and progress bars."""

import os
import sys
from typing import Literal, TextIO

_CODES = {"bold": "1", "red": "31;1", "green": "32"}


def paint(text: str, look: Literal["bold", "red", "green"], stream: TextIO) -> str:
    """Colour a text for a stream that is a terminal; NO_COLOR (no-color.org) and TERM=dumb leave it plain."""
    is_plain = os.environ.get("NO_COLOR") or os.environ.get("TERM") == "dumb" or not stream.isatty()
    return text if is_plain else f"\033[{_CODES[look]}m{text}\033[0m"


def has_bars() -> bool:
    """Say whether progress bars are shown: on a terminal, unless TQDM_DISABLE is set."""
    return sys.stderr.isatty() and not os.environ.get("TQDM_DISABLE")
