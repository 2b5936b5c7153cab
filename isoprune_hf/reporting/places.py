"""Hide the places of the author's machine in values that are published.

`plain_hub_id` tells names of the Hub from paths. `show_place` and `show_note` are for cards, `hide_places` and
`hide_paths` for files.
"""

import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from isoprune_hf.reporting.plain_text import plain_markdown

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_HUB_PREFIX = re.compile(r"hf(-hub)?:")
# A path from a root, a home or a drive, at the beginning of a text or in it; an address such as https://x is none.
_ROOTED = re.compile(r"""(?:^|[\s"'(=,\[])(?:~|[A-Za-z]:)?[/\\]{1,2}[^\s/\\]""")
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
    """Return a value of JSON in which each path has lost all but its last part: `/home/me/photos` is `./photos`.

    The values are those of settings, where a text with a slash is the name of something.
    """
    return _replace_texts(value, lambda text: f"./{_last_part(text)}" if is_place(text) else text)


def hide_paths(value: Any) -> Any:
    """Return a value of JSON in which no text holds a path from a root, a home or a drive; other texts stay.

    Unlike `hide_places` it is for texts of any kind, such as `int8/bf16`.
    """
    return _replace_texts(value, _hide_path)


def _hide_path(text: str) -> str:
    found = _ROOTED.search(text)
    if found is None:
        return text
    return f"./{_last_part(text)}" if found.start() == 0 and not text[0].isspace() else _HIDDEN


def _replace_texts(value: Any, change: Callable[[str], str]) -> Any:
    if isinstance(value, Mapping):
        return {change(name): _replace_texts(part, change) for name, part in value.items()}
    if isinstance(value, list):
        return [_replace_texts(part, change) for part in value]
    return change(value) if isinstance(value, str) else value


def _last_part(path: str) -> str:
    return re.split(r"[/\\]+", path.rstrip("/\\"))[-1]
