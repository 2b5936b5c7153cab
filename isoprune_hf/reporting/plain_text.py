"""Make text from a folder or a data set harmless where it is printed as Markdown; see `plain_markdown`."""

import re
from typing import Any

_HARMLESS = (("<", "&lt;"), ("`", "'"), ("](", "] ("))


def plain_markdown(value: Any) -> Any:
    """Return a value of JSON in which no text leaves its line or code span, or is read as HTML, a link or a table.

    Applied twice, it changes nothing more.
    """
    if isinstance(value, dict):
        return {plain_markdown(name): plain_markdown(part) for name, part in value.items()}
    if isinstance(value, list):
        return [plain_markdown(part) for part in value]
    if not isinstance(value, str):
        return value
    text = "".join(sign if sign.isprintable() else " " for sign in value)
    for sign, harmless in _HARMLESS:
        text = text.replace(sign, harmless)
    return re.sub(r"(?<!\\)\|", r"\\|", " ".join(text.split()))
