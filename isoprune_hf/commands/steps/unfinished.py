"""The folder of an unfinished `run`, next to its output: what was done of it is kept there until all of it is."""

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.logging import get_logger

from isoprune_hf.checkpoint.folder import read_json, write_file
from isoprune_hf.checkpoint.snapshots import has_snapshots
from isoprune_hf.checkpoint.target import CHECKPOINTS, Target
from isoprune_hf.errors import CheckpointError, RecipeError
from isoprune_hf.training.run import RUN_FOLDER

logger = get_logger(__name__)

_RECORD = "run.json"
_VERSION = 1


class Unfinished:
    """Places of an unfinished run.

    Args:
        folder: Its folder.
        target: Its output, which `result` replaces when all is done.
    """

    def __init__(self, folder: Path, target: Target):
        self.folder = folder
        self.target = target
        self.result = folder / "result"
        self.pruned = folder / "pruned"
        self.pretraining = folder / "pretraining"

    @property
    def has_training(self) -> bool:
        """True if a state of a training is saved."""
        places = (self.result, self.pretraining)
        return any(has_snapshots(place / CHECKPOINTS / RUN_FOLDER) for place in places)


@contextmanager
def open_unfinished(
    target: Target, identity: dict[str, Any], accelerator: Accelerator, *, overwrite: bool
) -> Iterator[Unfinished]:
    """Open the unfinished run of an output within the context, or begin a new one; all ranks call this.

    Args:
        target: The output.
        identity: Everything that determines the cut: a run is resumed only with the same identity.
        accelerator: The ranks; the main process writes.
        overwrite: Replace an unfinished run with another identity, instead of raising.

    Raises:
        RecipeError: There is an unfinished run with another identity, and a state of its training.
    """
    work = Unfinished(target.real.with_name(f".{target.real.name}.run"), target)
    wanted = json.loads(json.dumps(identity))  # as it is read from the file
    known = read_json(work.folder, _RECORD)
    is_same = known == {"format_version": _VERSION, "identity": wanted}
    if not is_same and known is not None and work.has_training and not overwrite:
        raise RecipeError(_describe_difference(target, known.get("identity") or {}, wanted))
    accelerator.wait_for_everyone()  # every rank has read the record
    if is_same:
        logger.info(f"continue the unfinished run of {target.path}")
    elif accelerator.is_main_process:
        shutil.rmtree(work.folder, ignore_errors=True)
        record = {"format_version": _VERSION, "identity": wanted}
        write_file(work.folder / _RECORD, json.dumps(record, indent=2, sort_keys=True) + "\n")
    try:
        yield work
    finally:
        if accelerator.is_main_process and [path.name for path in work.folder.glob("*")] == [_RECORD]:
            shutil.rmtree(work.folder, ignore_errors=True)  # nothing can be resumed, so nothing is kept


def finish(work: Unfinished) -> None:
    """Rename the result to the name of its target, and remove the rest; the main process calls this.

    Raises:
        CheckpointError: The target cannot be replaced, see also `Target.take_folder`; the same command tries it again.
    """
    try:
        work.target.take_folder(work.result)
        (work.folder / _RECORD).unlink()  # first: without it the rest is removed by the next run
    except OSError as error:
        raise CheckpointError(f"{work.target.real} cannot be written: {error}") from error
    shutil.rmtree(work.folder, ignore_errors=True)


def _describe_difference(target: Target, known: dict[str, Any], wanted: dict[str, Any]) -> str:
    changed = [name for name in sorted({*known, *wanted}) if known.get(name) != wanted.get(name)]
    pairs = [(name, known.get(name, "not set"), wanted.get(name, "not set")) for name in changed[:3]]
    values = "; ".join(f"{name} was {old}, got {new}" for name, old, new in pairs)
    return (
        f"--output {target.path} has an unfinished run with other settings: {values}; restore the old values to "
        "resume it, choose another folder, or replace it with --overwrite true"
    )
