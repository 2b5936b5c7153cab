"""Check, before any work, that a result can be written; see `check_output`."""

import os
from collections.abc import Sequence
from pathlib import Path

from isoprune_hf.errors import RecipeError

# A folder is replaced only if it holds one of these: it is then a model folder or the folder of a whole run.
MODEL_MARKS = (
    "config.json",
    "program.json",
    "model/config.json",
    "base/config.json",
    "checkpoints/last/config.json",
)


def check_output(
    output: str | Path,
    *,
    overwrite: bool,
    is_file: bool = False,
    holds_run: bool = False,
    marks: Sequence[str] = MODEL_MARKS,
    flag: str = "--output",
) -> Path:
    """Check, before any work, that a result can be written; creates nothing.

    Args:
        output: Place of the result.
        overwrite: Allow an existing result to be replaced.
        is_file: The result is a file and not a folder.
        holds_run: The folder contains a training run; the run itself checks whether it may be continued.
        marks: A folder may be replaced only if it contains one of these files.
        flag: Command line flag to name in errors.

    Returns:
        `output` as a path.

    Raises:
        RecipeError: The place is occupied or cannot be written.
    """
    path = Path(output)
    try:
        real = path.resolve()
    except RuntimeError as error:  # of Python 3.11 and 3.12
        raise RecipeError(f"{flag} {output} is a link that leads to itself; choose another name") from error
    if path.exists() and not (path.is_dir() or path.is_file()):
        raise RecipeError(f"{flag} {output} is a pipe or a device, and is not replaced; choose another name")
    if path.exists() and path.is_dir() == is_file:
        raise RecipeError(f"{flag} {output} is a {'folder' if is_file else 'file'}; choose another name")
    if is_file and path.exists() and not overwrite:
        raise RecipeError(f"{flag} {output} exists; choose another file, or replace it with --overwrite true")
    if path.is_dir() and any(path.iterdir()) and not holds_run:
        if not overwrite:
            raise RecipeError(
                f"{flag} {output} exists and is not empty; choose another folder, or replace it with --overwrite true"
            )
        check_replaceable(output, marks=marks, flag=flag)
    if os.path.ismount(path):
        raise RecipeError(f"{flag} {output} is a mount point, which cannot be renamed; choose a folder inside it")
    parent = next(place for place in real.parents if place.exists())
    for place in (parent, *([path] if path.is_dir() else [])):
        if not place.is_dir() or not os.access(place, os.W_OK):
            raise RecipeError(f"{flag} {output}: {place} is not a writable folder")
    return path


def check_replaceable(folder: str | Path, *, marks: Sequence[str] = MODEL_MARKS, flag: str = "folder") -> None:
    """Check that a folder holds nothing, or a result.

    Args:
        folder: The folder; it need not exist.
        marks: A result contains one of these files.
        flag: Name of the folder in errors.

    Raises:
        RecipeError: It contains other files.
    """
    path = Path(folder)
    if path.is_dir() and any(path.iterdir()) and not any((path / mark).is_file() for mark in marks):
        raise RecipeError(
            f"{flag} {folder} contains files that are not a result of this command; choose another folder"
        )
