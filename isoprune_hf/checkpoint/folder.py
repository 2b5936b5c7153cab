"""Write a model folder or a result file whole or not at all.

`save_model_folder`, `replace_folder`, `update_folder`, `replace_file` and `write_file` write to a temporary place,
which then takes the name of the target (see `target.py`). `read_json` reads a file of a folder.
"""

import json
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from transformers import BaseImageProcessor, ProcessorMixin

from isoprune_hf import plain_files
from isoprune_hf.checkpoint.finite import require_finite
from isoprune_hf.checkpoint.modeling_isoprune import model_class_of
from isoprune_hf.checkpoint.output_check import check_replaceable
from isoprune_hf.checkpoint.pretrained import IsoPrunePreTrainedModel
from isoprune_hf.checkpoint.stock import save_stock, stock_processor
from isoprune_hf.checkpoint.structure import as_saved
from isoprune_hf.checkpoint.sync import sync_file, sync_folder
from isoprune_hf.checkpoint.target import Target, locked_target
from isoprune_hf.checkpoint.tokenizer import save_tokenizer
from isoprune_hf.errors import CheckpointError, WriteError


def save_model_folder(
    folder: str | Path | Target,
    model: IsoPrunePreTrainedModel,
    processor: BaseImageProcessor | ProcessorMixin | None,
    *,
    plan: str | None = None,
    metrics: dict[str, Any] | None = None,
    keep: str | None = None,
    finish: Callable[[Path], None] | None = None,
) -> None:
    """Write config, weights, processor, plan and metrics; an existing folder is replaced in one step.

    Args:
        folder: Folder to write, or the one that this process has locked.
        model: Model to save; all its tensors must be finite.
        processor: Image processor of the model, or that of images and texts; None if it has none.
        plan: Pruning plan as JSON.
        metrics: `{base, pruned, finetuned}`, each `{top1, top5, loss, images}`.
        keep: Name of a subfolder of an existing folder that is not replaced.
        finish: Writes further files into the new folder before it is renamed.

    Raises:
        WriteError: The folder cannot be written.
        CheckpointError: A tensor is not finite.
    """

    def write(temporary: Path) -> None:
        require_finite(model)
        if model.config.layout == "uniform":
            save_stock(temporary, model)
        elif isinstance(model, model_class_of(model.config)):
            model.save_pretrained(temporary)
        else:
            as_saved(model.config, model.model).save_pretrained(temporary)
        save_tokenizer(temporary, model.config)
        if isinstance(processor, ProcessorMixin):
            for part in (processor.image_processor, processor.tokenizer):
                part.save_pretrained(temporary)
        elif processor is not None:
            saved = stock_processor(processor) if model.config.layout == "uniform" else processor
            saved.save_pretrained(temporary)
        if plan is not None:
            _write_text(temporary / "pruning_plan.json", plan)
        if metrics:
            _write_text(temporary / "metrics.json", json.dumps(metrics, indent=2, sort_keys=True) + "\n")
        if finish is not None:
            finish(temporary)

    replace_folder(folder, write, keep=keep)


def replace_folder(folder: str | Path | Target, write: Callable[[Path], None], *, keep: str | None = None) -> None:
    """Write a folder of files whole or not at all; an existing folder is replaced in one step.

    Args:
        folder: Folder to write, or the one that this process has locked; missing parents are created.
        write: Writes the files into the temporary folder passed to it.
        keep: See `save_model_folder`.

    Raises:
        WriteError: The folder cannot be written.
        OccupiedError: Another process writes there.
        RecipeError: The folder contains files that are no result.
    """
    if not isinstance(folder, Target):
        if keep is None:
            check_replaceable(folder)
        with locked_target(folder, keep=keep) as target:
            replace_folder(target, write)
        return

    def write_and_sync(temporary: Path) -> None:
        write(temporary)
        for path in temporary.rglob("*"):
            if path.is_file():
                os.chmod(path, 0o644)
                sync_file(path)
            else:
                os.chmod(path, 0o755)
                sync_folder(path)

    _put(folder, write_and_sync)


def update_folder(target: Target, write: Callable[[Path], None]) -> None:
    """Change files of a folder in one step: a reader sees the files before or after, never some of both.

    Args:
        target: The folder, which this process has locked.
        write: Writes the files that change, with `replace_file` or `write_file`, into a copy of the folder passed to
            it. The other files of the copy are links to those of the folder.

    Raises:
        WriteError: The folder cannot be written.
    """
    if os.path.ismount(target.real):
        raise WriteError(f"{target.real} cannot be written: it is a mount point, which cannot be renamed")

    def copy_and_write(temporary: Path) -> None:
        link_files(target.real, temporary, leave_out=target.keep)
        write(temporary)

    _put(target, copy_and_write)


def link_files(source: Path, place: Path, *, leave_out: str | None = None) -> None:
    """Link the files of a folder into another one, or copy them where the file system has no links.

    Args:
        source: The folder.
        place: An existing folder without these files.
        leave_out: Name of a subfolder that is not linked.
    """

    def names_left_out(folder: str, names: list[str]) -> list[str]:
        return [name for name in names if name == leave_out and Path(folder) == source]

    shutil.copytree(
        source, place, symlinks=True, ignore=names_left_out, copy_function=_link_or_copy, dirs_exist_ok=True
    )


def _link_or_copy(source: str, place: str) -> None:
    try:
        os.link(source, place, follow_symlinks=False)
    except OSError:
        shutil.copy2(source, place, follow_symlinks=False)


def _put(target: Target, write: Callable[[Path], None]) -> None:
    """Write a folder next to the target, which it then replaces."""
    place = target.real
    try:
        temporary = Path(tempfile.mkdtemp(prefix=f".{place.name}.", suffix=".tmp", dir=place.parent))
        try:
            write(temporary)
            sync_folder(temporary)
            target.take_folder(temporary)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    except (OSError, SafetensorError) as error:  # safetensors raises its own error on a full disk
        raise WriteError(f"{place} cannot be written: {error}") from error


def replace_file(path: str | Path | Target, write: Callable[[Path], None]) -> None:
    """Write one file whole or not at all.

    Args:
        path: File to write, or the one that this process has locked; missing parents are created.
        write: Writes the content to the temporary file passed to it.

    Raises:
        WriteError: The file cannot be written.
    """
    place = path.real if isinstance(path, Target) else Path(path)
    temporary = place.with_name(f".tmp.{place.name}")
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        try:
            write(temporary)
            os.chmod(temporary, 0o644)
            sync_file(temporary)
            if isinstance(path, Target):
                path.take_file(temporary)
            else:
                os.replace(temporary, place)
                sync_folder(place.parent)
        finally:
            temporary.unlink(missing_ok=True)
    except OSError as error:
        raise WriteError(f"{place} cannot be written: {error}") from error


def write_file(path: str | Path, text: str) -> None:
    """Write one text file, in UTF-8 and with \\n as line ends, whole or not at all.

    Raises:
        WriteError: The file cannot be written.
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
        values: object = plain_files.read_json(path)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: not readable as JSON ({error})") from error
    if not isinstance(values, dict):
        raise CheckpointError(f"{path}: must contain a JSON object")
    return values
