"""Write what is known about an unexpected error to a file that a user can send; see `write_report`."""

import os
import platform
import shlex
import sys
import tempfile
import traceback
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from isoprune_hf.hub.requests import find_login

_PACKAGES = (
    "isoprune-hf",
    "torch",
    "transformers",
    "timm",
    "torchvision",
    "accelerate",
    "datasets",
    "huggingface_hub",
)
_SECRET_NAMES = ("TOKEN", "SECRET", "PASSWORD", "API_KEY")
_SHORTEST_SECRET = 6  # characters; shorter values of such variables are switches


def write_report(error: Exception) -> Path | None:
    """Write the command, the versions and the traceback to a new file that only this user may read.

    Values of environment variables that are named like secrets, and the login to the Hub, are left out.

    Returns:
        The file; None if none can be written.
    """
    lines = [
        f"command: {shlex.join(sys.argv)}",
        f"python {platform.python_version()} on {platform.platform()}",
        *(f"{name} {_version_of(name)}" for name in _PACKAGES),
        "",
        *traceback.format_exception(error),
    ]
    text = "\n".join(line.rstrip("\n") for line in lines)
    for secret in _secrets():
        text = text.replace(secret, "[secret]")
    try:
        descriptor, name = tempfile.mkstemp(prefix="isoprune-error-", suffix=".log", text=True)
        with os.fdopen(descriptor, "w", encoding="utf-8", errors="backslashreplace") as file:
            file.write(f"{text}\n")
    except OSError:
        return None
    return Path(name)


def find_place(error: Exception) -> str:
    """Return file and line of this package in which an error was raised, or that called what raised it."""
    package = Path(__file__).parents[1]
    frames = traceback.extract_tb(error.__traceback__)
    ours = [frame for frame in frames if Path(frame.filename).is_relative_to(package)]
    return "unknown place" if not ours else f"{Path(ours[-1].filename).relative_to(package.parent)}:{ours[-1].lineno}"


def _version_of(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "is not installed"


def _secrets() -> list[str]:
    """Return the values that no file may contain, the longest first."""
    named = {value for name, value in os.environ.items() if any(part in name.upper() for part in _SECRET_NAMES)}
    return sorted(filter(lambda value: len(value) >= _SHORTEST_SECRET, named | {find_login()}), key=len)[::-1]
