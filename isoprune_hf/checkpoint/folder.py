"""The folder of a pruned model: written whole or not at all."""

import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

from transformers import BaseImageProcessor

from isoprune_hf.checkpoint.modeling_isoprune import IsoPruneForImageClassification
from isoprune_hf.errors import CheckpointError, RecipeError


def check_output(folder: str | Path, *, overwrite: bool) -> Path:
    """Check, before any work, that a result can be written; creates nothing.

    Args:
        folder: Where the result shall lie.
        overwrite: Whether what lies there may be replaced.

    Raises:
        RecipeError: The folder holds something, or its parent cannot be written.
    """
    folder = Path(folder)
    if folder.is_file() or (folder.is_dir() and any(folder.iterdir()) and not overwrite):
        raise RecipeError(
            f"--output {folder} exists and is not empty; choose another folder, or replace it with --overwrite true"
        )
    parent = next(path for path in [folder, *folder.absolute().parents] if path.exists())
    if not os.access(parent, os.W_OK):
        raise RecipeError(f"--output {folder}: {parent} cannot be written")
    return folder


def save_model_folder(
    folder: str | Path,
    model: IsoPruneForImageClassification,
    processor: BaseImageProcessor,
    *,
    plan: str | None = None,
    metrics: dict[str, Any] | None = None,
    keep: Path | None = None,
) -> None:
    """Write config, weights, processor, plan and metrics; a folder that is there is replaced in one step.

    Args:
        folder: The folder.
        model: The model to save.
        processor: Its image processor.
        plan: JSON of the pruning plan.
        metrics: `{base, pruned, finetuned}`, each `{top1, top5, loss, images}`.
        keep: A folder inside the old `folder` that the new one takes over.

    Raises:
        CheckpointError: The folder cannot be written.
    """
    folder = Path(folder).absolute()
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", suffix=".tmp", dir=folder.parent))
        try:
            model.save_pretrained(temporary)
            processor.save_pretrained(temporary)
            if plan is not None:
                (temporary / "pruning_plan.json").write_text(plan)
            if metrics:
                (temporary / "metrics.json").write_text(json.dumps(metrics, indent=2, sort_keys=True) + "\n")
            for file in temporary.iterdir():
                _sync(file)
            if keep is not None:
                os.rename(keep, temporary / keep.name)
            _replace(temporary, folder)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    except OSError as error:
        raise CheckpointError(f"{folder} cannot be written: {error}") from error


def write_file(path: str | Path, text: str) -> None:
    """Write one text file whole or not at all."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(text)
    _sync(temporary)
    os.replace(temporary, path)


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


def _replace(temporary: Path, folder: Path) -> None:
    os.chmod(temporary, 0o755)
    if folder.exists():
        old = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", suffix=".old", dir=folder.parent))
        os.rename(folder, old / folder.name)
        os.rename(temporary, folder)
        shutil.rmtree(old)
    else:
        os.rename(temporary, folder)
