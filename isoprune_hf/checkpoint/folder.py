"""Write a model folder or a result file whole or not at all.

`check_output` checks before any work that a result can be written. `save_model_folder`, `replace_folder`,
`replace_file` and `write_file` write to a temporary place and rename it. `read_json` reads a file of a folder.
"""

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
from isoprune_hf.checkpoint.sync import sync_file
from isoprune_hf.errors import CheckpointError, RecipeError

# A folder is replaced only if it holds one of these: it is then a model folder or the folder of a whole run.
MODEL_MARKS = ("config.json", "model/config.json", "base/config.json", "checkpoints/last/config.json")


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
    if path.exists() and path.is_dir() == is_file:
        raise RecipeError(f"{flag} {output} is a {'folder' if is_file else 'file'}; choose another name")
    if is_file and path.exists() and not overwrite:
        raise RecipeError(f"{flag} {output} exists; choose another file, or replace it with --overwrite true")
    if path.is_dir() and any(path.iterdir()) and not holds_run:
        if not overwrite:
            raise RecipeError(
                f"{flag} {output} exists and is not empty; choose another folder, or replace it with --overwrite true"
            )
        if not any((path / mark).is_file() for mark in marks):
            raise RecipeError(
                f"{flag} {output} contains files that are not a result of this command; choose another folder"
            )
    places = [*path.absolute().parents] if is_file else [path, *path.absolute().parents]
    parent = next(place for place in places if place.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise RecipeError(f"{flag} {output}: {parent} is not a writable folder")
    return path


def save_model_folder(
    folder: str | Path,
    model: IsoPruneForImageClassification,
    processor: BaseImageProcessor | None,
    *,
    plan: str | None = None,
    metrics: dict[str, Any] | None = None,
    keep: str | None = None,
    finish: Callable[[Path], None] | None = None,
) -> None:
    """Write config, weights, processor, plan and metrics; an existing folder is replaced in one step.

    Args:
        folder: Folder to write.
        model: Model to save.
        processor: Image processor of the model; None if it has none.
        plan: Pruning plan as JSON.
        metrics: `{base, pruned, finetuned}`, each `{top1, top5, loss, images}`.
        keep: Name of a subfolder of an existing folder that is not replaced. The files around it are then replaced
            one by one. config.json is removed first and added last, so a half-written folder cannot be opened.
        finish: Writes further files into the new folder before it is renamed.

    Raises:
        CheckpointError: The folder cannot be written.
    """

    def write(temporary: Path) -> None:
        if model.config.layout == "uniform":
            save_stock(temporary, model)
        else:
            model.save_pretrained(temporary)
        if processor is not None:
            saved = stock_processor(processor) if model.config.layout == "uniform" else processor
            saved.save_pretrained(temporary)
        if plan is not None:
            _write_text(temporary / "pruning_plan.json", plan)
        if metrics:
            _write_text(temporary / "metrics.json", json.dumps(metrics, indent=2, sort_keys=True) + "\n")
        if finish is not None:
            finish(temporary)

    replace_folder(folder, write, keep=keep)


def replace_folder(folder: str | Path, write: Callable[[Path], None], *, keep: str | None = None) -> None:
    """Write a folder of files whole or not at all; an existing folder is replaced in one step.

    Args:
        folder: Folder to write; missing parents are created.
        write: Writes the files into the temporary folder passed to it.
        keep: See `save_model_folder`.

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
                os.chmod(file, 0o644)
                sync_file(file)
            _replace(temporary, folder, keep)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    except (OSError, SafetensorError) as error:  # safetensors raises its own error on a full disk
        raise CheckpointError(f"{folder} cannot be written: {error}") from error


def replace_file(path: str | Path, write: Callable[[Path], None]) -> None:
    """Write one file whole or not at all.

    Args:
        path: File to write; missing parents are created.
        write: Writes the content to the temporary file passed to it.

    Raises:
        CheckpointError: The file cannot be written.
    """
    path = Path(path)
    temporary = path.with_name(f".tmp.{path.name}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            write(temporary)
            os.chmod(temporary, 0o644)
            sync_file(temporary)
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be written: {error}") from error


def write_file(path: str | Path, text: str) -> None:
    """Write one text file, in UTF-8 and with \\n as line ends, whole or not at all.

    Raises:
        CheckpointError: The file cannot be written.
    """
    replace_file(path, lambda temporary: _write_text(temporary, text))


def _write_text(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8", newline="\n")


def read_json(folder: str | Path, name: str) -> dict[str, Any] | None:
    """Read a JSON file of a folder; return None if it does not exist.

    Raises:
        CheckpointError: The file does not contain a JSON object.
    """
    path = Path(folder) / name
    if not path.is_file():
        return None
    try:
        values: object = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: not readable as JSON ({error})") from error
    if not isinstance(values, dict):
        raise CheckpointError(f"{path}: must contain a JSON object")
    return values


def _replace(temporary: Path, folder: Path, keep: str | None) -> None:
    """Rename `temporary` to `folder`; a failed rename undoes those before it."""
    os.chmod(temporary, 0o755)
    if not folder.exists():
        os.rename(temporary, folder)
        return
    old = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", suffix=".old", dir=folder.parent))
    moves = [(folder, old / folder.name), (temporary, folder)]
    if keep is not None and (folder / keep).is_dir():
        outgoing = sorted((path for path in folder.iterdir() if path.name != keep), key=_is_not_config)
        incoming = sorted(temporary.iterdir(), key=_is_not_config, reverse=True)
        moves = [(path, old / path.name) for path in outgoing] + [(path, folder / path.name) for path in incoming]
    done: list[tuple[Path, Path]] = []
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
