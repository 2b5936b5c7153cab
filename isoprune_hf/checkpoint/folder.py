"""The folder of a pruned model: written whole or not at all."""

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from transformers import BaseImageProcessor

from isoprune_hf.checkpoint.modeling_isoprune import IsoPruneForImageClassification
from isoprune_hf.checkpoint.stock import save_stock, stock_processor
from isoprune_hf.errors import CheckpointError, RecipeError

# A folder that holds none of these is not replaced: it is no model of ours, nor one of a whole run.
MODEL_MARKS = ("config.json", "model/config.json", "base/config.json", "checkpoints/last/config.json")


def check_output(
    output: str | Path,
    *,
    overwrite: bool,
    is_file: bool = False,
    is_begun: bool = False,
    marks: Sequence[str] = MODEL_MARKS,
    flag: str = "--output",
) -> Path:
    """Check, before any work, that a result can be written; creates nothing.

    Args:
        output: Where the result shall lie.
        overwrite: Whether a result that lies there may be replaced.
        is_file: The result is a file and not a folder.
        is_begun: The folder holds a run of ours, which decides whether it goes on there.
        marks: Files of which a folder must hold one to be replaced.
        flag: Flag that is named in errors.

    Raises:
        RecipeError: Something else lies there, or it cannot be written.
    """
    path = Path(output)
    if path.exists() and path.is_dir() == is_file:
        raise RecipeError(f"{flag} {output} is a {'folder' if is_file else 'file'}; choose another name")
    if is_file and path.exists() and not overwrite:
        raise RecipeError(f"{flag} {output} exists; choose another file, or replace it with --overwrite true")
    if path.is_dir() and any(path.iterdir()) and not is_begun:
        if not overwrite:
            raise RecipeError(
                f"{flag} {output} exists and is not empty; choose another, or replace it with --overwrite true"
            )
        if not any((path / mark).is_file() for mark in marks):
            raise RecipeError(
                f"{flag} {output} holds other files than a result of this command; choose another folder"
            )
    places = [*path.absolute().parents] if is_file else [path, *path.absolute().parents]
    parent = next(place for place in places if place.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise RecipeError(f"{flag} {output}: {parent} cannot be written")
    return path


def save_model_folder(
    folder: str | Path,
    model: IsoPruneForImageClassification,
    processor: BaseImageProcessor,
    *,
    plan: str | None = None,
    metrics: dict[str, Any] | None = None,
    keep: str | None = None,
    finish: Callable[[Path], None] | None = None,
) -> None:
    """Write config, weights, processor, plan and metrics; a folder that is there is replaced in one step.

    Args:
        folder: The folder.
        model: The model to save.
        processor: Its image processor.
        plan: JSON of the pruning plan.
        metrics: `{base, pruned, finetuned}`, each `{top1, top5, loss, images}`.
        keep: Name of a folder inside the old one that stays where it is. The files around it are then replaced one by
            one: config.json leaves first and comes last, so what is half-written opens nowhere.
        finish: Writes further files into the new folder before it takes its place.

    Raises:
        CheckpointError: The folder cannot be written.
    """

    def write(temporary: Path) -> None:
        if model.config.layout == "uniform":
            save_stock(temporary, model)
            stock_processor(processor).save_pretrained(temporary)
        else:
            model.save_pretrained(temporary)
            processor.save_pretrained(temporary)
        if plan is not None:
            (temporary / "pruning_plan.json").write_text(plan)
        if metrics:
            (temporary / "metrics.json").write_text(json.dumps(metrics, indent=2, sort_keys=True) + "\n")
        if finish is not None:
            finish(temporary)

    replace_folder(folder, write, keep=keep)


def replace_folder(folder: str | Path, write: Callable[[Path], None], *, keep: str | None = None) -> None:
    """Write a folder of files whole or not at all; one that is there is replaced in one step.

    Args:
        folder: The folder; those above it are made.
        write: Writes the files into the temporary folder that it is given.
        keep: As in `save_model_folder`.

    Raises:
        CheckpointError: The folder cannot be written.
    """
    folder = Path(folder).absolute()
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", suffix=".tmp", dir=folder.parent))
        try:
            write(temporary)
            for file in temporary.iterdir():
                _sync(file)
            _replace(temporary, folder, keep)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    except (OSError, SafetensorError) as error:  # safetensors has its own for a full disk
        raise CheckpointError(f"{folder} cannot be written: {error}") from error


def replace_file(path: str | Path, write: Callable[[Path], None]) -> None:
    """Write one file whole or not at all.

    Args:
        path: The file; its folder is made.
        write: Writes the content to the temporary file that it is given.

    Raises:
        CheckpointError: The file cannot be written.
    """
    path = Path(path)
    temporary = path.with_name(f".tmp.{path.name}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            write(temporary)
            _sync(temporary)
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be written: {error}") from error


def write_file(path: str | Path, text: str) -> None:
    """Write one text file whole or not at all."""
    replace_file(path, lambda temporary: temporary.write_text(text))


def read_json(folder: str | Path, name: str) -> dict[str, Any] | None:
    """Read a JSON file of a folder; None where there is none.

    Raises:
        CheckpointError: The file is no JSON object.
    """
    path = Path(folder) / name
    if not path.is_file():
        return None
    try:
        values = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: not readable as JSON ({error})") from error
    if not isinstance(values, dict):
        raise CheckpointError(f"{path}: must hold a JSON object")
    return values


def _sync(path: Path) -> None:
    os.chmod(path, 0o644)
    with path.open("rb") as file:
        os.fsync(file.fileno())


def _replace(temporary: Path, folder: Path, keep: str | None) -> None:
    os.chmod(temporary, 0o755)
    if not folder.exists():
        os.rename(temporary, folder)
        return
    old = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", suffix=".old", dir=folder.parent))
    moves = [(folder, old / folder.name), (temporary, folder)]
    if keep is not None and (folder / keep).is_dir():
        leaving = sorted((path for path in folder.iterdir() if path.name != keep), key=_is_not_config)
        coming = sorted(temporary.iterdir(), key=_is_not_config, reverse=True)
        moves = [(path, old / path.name) for path in leaving] + [(path, folder / path.name) for path in coming]
    done = []
    try:
        for source, target in moves:
            os.rename(source, target)
            done.append((source, target))
    except OSError:
        for source, target in reversed(done):
            os.rename(target, source)
        old.rmdir()
        raise
    shutil.rmtree(old)


def _is_not_config(path: Path) -> bool:
    return path.name != "config.json"
