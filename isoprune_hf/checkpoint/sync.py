"""Flush files and folders to disk before they are renamed into place."""

import os
from pathlib import Path


def sync_file(path: Path) -> None:
    """Flush the content of a file to disk."""
    with path.open("r+b") as file:  # Windows flushes only files that are open for writing
        os.fsync(file.fileno())


def sync_folder(path: Path) -> None:
    """Flush the entries of a folder to disk; does nothing on Windows, which cannot open folders."""
    if os.name == "nt":
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
