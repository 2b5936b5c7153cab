"""Read files of unknown origin within the budgets of `limits`.

`read_bytes`, `read_text` and `read_json` read; `require_file` checks a file that a library opens.
"""

import errno
import json
import os
import stat
from pathlib import Path
from typing import Any

from isoprune_hf.limits import MAX_JSON_BYTES, MAX_NESTING

_NO_FILE = "not a file but a pipe, a device or a folder"


def read_bytes(path: str | Path, limit: int) -> bytes:
    """Read a file.

    Args:
        path: The file.
        limit: Largest size in bytes.

    Raises:
        OSError: It cannot be read, has more bytes, or is no file but a pipe, a device or a folder, from which reading
            may never end.
    """
    # A pipe without a writer would block the opening.
    descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    with open(descriptor, "rb") as file:
        found = os.fstat(descriptor)
        if not stat.S_ISREG(found.st_mode):
            raise OSError(errno.EINVAL, _NO_FILE, str(path))
        # `read` allocates as many bytes as it may read; the second one reads what a growing file got in between.
        content = file.read(min(found.st_size, limit) + 1)
        content += file.read(limit + 1 - len(content)) if len(content) > found.st_size else b""
    if len(content) > limit:
        raise OSError(errno.EFBIG, f"more than {limit:,} bytes", str(path))
    return content


def require_file(path: str | Path) -> None:
    """Check that a path is a file, before a library opens it.

    Raises:
        OSError: It does not exist, or is no file but a pipe, a device or a folder, see `read_bytes`.
    """
    if not stat.S_ISREG(os.stat(path).st_mode):
        raise OSError(errno.EINVAL, _NO_FILE, str(path))


def read_text(path: str | Path, limit: int = MAX_JSON_BYTES) -> str:
    """Read a text file in UTF-8.

    Args:
        path: The file.
        limit: Largest size in bytes.

    Raises:
        OSError: See `read_bytes`.
        ValueError: It is not UTF-8.
    """
    return read_bytes(path, limit).decode("utf-8")


def read_json(path: str | Path) -> Any:
    """Read a JSON file.

    Raises:
        OSError: See `read_text`.
        ValueError: It is not JSON, or nested too deeply.
    """
    return parse_json(read_text(path))


def parse_json(text: str) -> Any:
    """Parse JSON that is nested at most `MAX_NESTING` deep, far less than recursive functions can follow.

    Raises:
        ValueError: The text is not JSON, or nested too deeply.
    """
    too_deep = f"nested more than {MAX_NESTING} deep"
    try:
        value = json.loads(text)
    except RecursionError as error:
        raise ValueError(too_deep) from error
    if is_nested_too_deeply(value):
        raise ValueError(too_deep)
    return value


def is_nested_too_deeply(value: Any) -> bool:
    """Return whether lists and mappings are nested more than `MAX_NESTING` deep."""
    level = [value]
    for _ in range(MAX_NESTING + 1):
        level = [part for part in level if isinstance(part, list | dict)]
        if not level:
            return False
        level = [inner for part in level for inner in (part.values() if isinstance(part, dict) else part)]
    return True
