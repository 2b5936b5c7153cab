"""Hide the places of the author's machine in values that are published.

`is_hub_id` tells names of the Hub from paths; `show_place` and `show_note` are for cards, `hide_places` is for files.
"""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from isoprune_hf.reporting.plain_text import plain_markdown

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_HUB_PREFIX = re.compile(r"hf(-hub)?:")
_HIDDEN = "not shown, because it contains a path"


def plain_hub_id(name: Any) -> str | None:
    """Return a name of the Hub without the prefix `hf:` or `hf-hub:`; None for anything else."""
    if not isinstance(name, str) or name.startswith("torchvision/"):
        return None
    plain = _HUB_PREFIX.sub("", name, count=1)
    return plain if _HUB_ID.fullmatch(plain) and not Path(plain).exists() else None


def is_place(text: str) -> bool:
    """Return whether a text is a path and no name of the Hub or of torchvision."""
    return bool(re.search(r"[/\\]", text)) and not text.startswith("torchvision/") and plain_hub_id(text) is None


def show_place(value: Any) -> str:
    """Return a value as text of a table cell; a path loses all but its last part."""
    text = value if isinstance(value, str) else json.dumps(value)
    if re.search(r"[/\\]", text) and not isinstance(value, str):
        text = _HIDDEN
    elif is_place(text):
        text = f"a local folder ({_last_part(text)})"
    return str(plain_markdown(text))


def show_note(note: str) -> str:
    """Return a note of a plan on one line; one that holds a path is not shown."""
    return str(plain_markdown(hide_note(note)))


def hide_note(note: str) -> str:
    """Return a note of a plan, or the text that replaces one with a path."""
    return _HIDDEN if re.search(r"[/\\]", note) else note


def hide_places(value: Any) -> Any:
    """Return a value of JSON in which each path has lost all but its last part: `/home/me/photos` is `./photos`."""
    if isinstance(value, Mapping):
        return {hide_places(name): hide_places(part) for name, part in value.items()}
    if isinstance(value, list):
        return [hide_places(part) for part in value]
    return f"./{_last_part(value)}" if isinstance(value, str) and is_place(value) else value


def _last_part(path: str) -> str:
    return re.split(r"[/\\]+", path.rstrip("/\\"))[-1]
