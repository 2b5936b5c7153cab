"""The folder of a resumable training: who trains there, with which settings, its snapshots and its log."""

import json
import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, TypedDict, cast

import torch
import xxhash
from accelerate import Accelerator
from accelerate.logging import get_logger
from accelerate.utils import broadcast

from isoprune_hf.checkpoint.folder import read_json, write_file
from isoprune_hf.checkpoint.snapshots import (
    Snapshot,
    has_snapshots,
    read_newest_snapshot,
    read_snapshot,
    remove_leftovers,
    remove_snapshots,
    write_snapshot,
)
from isoprune_hf.errors import (
    CheckpointError,
    DamagedStateError,
    Interrupted,
    IsoPruneError,
    OccupiedError,
    RecipeError,
    WriteError,
)
from isoprune_hf.training.interruption import Interruption
from isoprune_hf.training.log import TrainingLog

logger = get_logger(__name__)

RUN_FOLDER = "training"  # inside the checkpoints of an output
_RUN = "run.json"
_VERSION = 1


class RunState(TypedDict):
    """Content of `run.json`."""

    format_version: int
    finished: bool
    identity: dict[str, Any]


@dataclass(frozen=True)
class RunSettings:
    """Settings of a run that do not change the weights.

    Args:
        snapshot_every: Updates between two snapshots, besides those at the end of each epoch.
        snapshot_minutes: Time between two snapshots.
        max_minutes: Time after which the run ends as by a signal.
        log_every: Updates between two entries of the log.
        tracker: Name of a tracker of accelerate for the log, besides its files.
        flops: Floating-point operations of training on one image, including the teacher's, for the log.
        peak_tflops: Peak of one device in 10^12 floating-point operations per second, for the log.
    """

    snapshot_every: int | None = None
    snapshot_minutes: float | None = None
    max_minutes: float | None = None
    log_every: int = 50
    tracker: str | None = None
    flops: float | None = None
    peak_tflops: float | None = None


class TrainingRun:
    """Owns the folder of a run inside its block; all ranks open it, only the main process writes.

    The caller has locked the output that contains the folder, see `checkpoint.target`.

    Args:
        checkpoints: Folder of the model's checkpoints; the run is in `training` inside it.
        identity: Everything that determines the weights, by setting: a run is resumed only with the same identity.
        accelerator: The ranks.
        settings: Everything else.
        overwrite: Replace an unfinished run with another identity, instead of raising.
        output: Output to name in errors; the default is the parent of the checkpoints.

    Raises:
        OccupiedError: The folder cannot be written.
        RecipeError: The folder has an unfinished run with another identity.
    """

    def __init__(
        self,
        checkpoints: Path,
        identity: dict[str, Any],
        accelerator: Accelerator,
        settings: RunSettings | None = None,
        *,
        overwrite: bool = False,
        output: Path | None = None,
    ):
        self.checkpoints = checkpoints
        self._output = output or checkpoints.parent
        self.folder = checkpoints / RUN_FOLDER
        self.settings = settings or RunSettings()
        self.interruption = Interruption(self.settings.max_minutes)
        self._identity = json.loads(json.dumps(identity))  # as it is read from the file
        self.log = TrainingLog(self.folder, tracker=self.settings.tracker, settings=self._identity)
        self._accelerator = accelerator
        self._overwrite = overwrite
        self._digest = xxhash.xxh3_128(json.dumps(identity, sort_keys=True).encode()).hexdigest()
        self._last_snapshot = time.monotonic()

    def __enter__(self) -> "TrainingRun":
        self._accelerator.wait_for_everyone()  # all ranks have read the folder
        if self._accelerator.is_main_process:
            try:
                self.folder.mkdir(parents=True, exist_ok=True)
                self._begin()
            except OSError as error:
                raise OccupiedError(f"--output: {self.folder} cannot be written ({error.strerror})") from error
        self._accelerator.wait_for_everyone()
        self.interruption.__enter__()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        try:
            self.interruption.__exit__(kind, error, trace)
        except Interrupted as stopped:
            self._close(stopped)
            raise
        self._close(error)

    def _close(self, error: BaseException | None) -> None:
        """Close the log, after `error` or after no error; the main process writes."""
        if not self._accelerator.is_main_process:
            return
        if isinstance(error, IsoPruneError) and not self.is_finished and not has_snapshots(self.folder):
            # Nothing can be resumed, so nothing is kept.
            shutil.rmtree(self.folder, ignore_errors=True)
            for folder in (self.checkpoints, self.checkpoints.parent):
                if folder.is_dir() and not any(folder.iterdir()):
                    folder.rmdir()
        self.log.close()

    @property
    def is_finished(self) -> bool:
        """True if the result of a run with this identity was written."""
        state = read_run(self.checkpoints)
        return state is not None and state["finished"] and state["identity"] == self._identity

    @property
    def has_state(self) -> bool:
        """True if a snapshot is saved."""
        return has_snapshots(self.folder)

    def _begin(self) -> None:
        """Prepare the folder for the unfinished run in it, or for a new one."""
        state = read_run(self.checkpoints)
        is_unfinished = state is not None and not state["finished"]
        is_same = state is not None and state["identity"] == self._identity
        if state is not None and is_unfinished and has_snapshots(self.folder) and not is_same and not self._overwrite:
            raise RecipeError(self._difference(state["identity"]))
        remove_leftovers(self.folder)
        for path in (*self.checkpoints.glob(".*.tmp"), *self.checkpoints.glob(".*.old")):  # of killed writers
            shutil.rmtree(path, ignore_errors=True)
        for path in self.checkpoints.glob(".*.lock"):
            path.unlink()
        if is_unfinished and is_same:
            return
        # From here on, snapshots of an older run are invalid.
        self._write_state(finished=False)
        for path in self.checkpoints.iterdir():
            if path.name != RUN_FOLDER:
                shutil.rmtree(path, ignore_errors=True)
        for path in self.folder.iterdir():
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            elif path.name != _RUN:
                path.unlink()

    def _difference(self, known: dict[str, Any]) -> str:
        """Return the message about an unfinished run with another identity."""
        names = sorted({*known, *self._identity})
        changed = [name for name in names if known.get(name) != self._identity.get(name)]
        pairs = [(name, known.get(name, "not set"), self._identity.get(name, "not set")) for name in changed[:3]]
        values = "; ".join(f"{name} was {old}, got {new}" for name, old, new in pairs)
        return (
            f"--output {self._output} contains an unfinished run with other settings: {values}; restore "
            "the old values to resume it, choose another folder, or replace it with --overwrite true"
        )

    def _write_state(self, *, finished: bool) -> None:
        state: RunState = {"format_version": _VERSION, "finished": finished, "identity": self._identity}
        write_file(self.folder / _RUN, json.dumps(state, indent=2, sort_keys=True) + "\n")

    def newest_snapshot(self) -> Snapshot | None:
        """Read the newest intact snapshot, the same on all ranks; None if there is no snapshot.

        Raises:
            DamagedStateError: There are snapshots, and none is intact.
        """
        position = torch.full((2,), -1, device=self._accelerator.device)
        found = None
        if self._accelerator.is_main_process:
            try:
                found = read_newest_snapshot(self.folder, run=self._digest)
            except DamagedStateError:
                if not self._overwrite:
                    raise
                logger.warning(f"no training state in {self.folder} is intact: starting over, as --overwrite is set")
                remove_snapshots(self.folder)
            if found is not None:
                position.copy_(torch.tensor([found.epoch, found.update]))
        epoch, update = broadcast(position).tolist()
        if epoch < 0 or self._accelerator.is_main_process:
            return found
        return read_snapshot(self.folder, epoch, update)

    def measure_compute(self, images_per_second: float) -> dict[str, float]:
        """Return a speed in 10^12 operations per second (`tflops`), and as a share of all devices' peak (`mfu`).

        Source:
            Chowdhery et al., PaLM, 2022 (arXiv 2204.02311), section 4.1: recomputed operations do not count.
        """
        if self.settings.flops is None:
            return {}
        tflops = images_per_second * self.settings.flops / 1e12
        if self.settings.peak_tflops is None:
            return {"tflops": tflops}
        return {"tflops": tflops, "mfu": tflops / (self.settings.peak_tflops * self._accelerator.num_processes)}

    def is_snapshot_due(self, update: int) -> bool:
        """Return whether a snapshot is due after `update` updates of an epoch; called on the main process."""
        minutes = self.settings.snapshot_minutes
        every = self.settings.snapshot_every
        is_late = minutes is not None and time.monotonic() - self._last_snapshot >= 60 * minutes
        return is_late or (every is not None and update % every == 0)

    def save_snapshot(self, snapshot: Snapshot, *, is_last: bool = False) -> None:
        """Write a snapshot; a failure is only a warning, unless it is the last snapshot.

        Raises:
            WriteError: The last snapshot cannot be written.
        """
        try:
            write_snapshot(self.folder, snapshot, run=self._digest)
        except OSError as error:
            text = f"the training state {snapshot.name} cannot be written to {self.folder} ({error.strerror or error})"
            if is_last:
                if self.has_state:
                    raise WriteError(f"{text}; the previous state is still there") from error
                raise WriteError(f"{text}; there is no earlier state either") from error
            logger.warning(f"{text}; training continues without it")
        self._last_snapshot = time.monotonic()

    def finish(self) -> None:
        """Mark the run as finished, and remove its snapshots; the log stays. Call it when the result is written."""
        if self._accelerator.is_main_process:
            self._write_state(finished=True)
            remove_snapshots(self.folder)
            self.log.draw()
        self._accelerator.wait_for_everyone()


def is_begun(checkpoints: Path) -> bool:
    """Return whether a run was ever started in a folder, even if it was killed before its first file."""
    return (checkpoints / RUN_FOLDER).is_dir()


def read_run(checkpoints: Path) -> RunState | None:
    """Read the identity of the run in a folder, and whether it is finished; None if there is no run.

    Raises:
        CheckpointError: The file has an unknown version.
    """
    state = read_json(checkpoints / RUN_FOLDER, _RUN)
    if state is not None and (state.get("format_version") != _VERSION or {"finished", "identity"} - state.keys()):
        raise CheckpointError(f"{checkpoints / RUN_FOLDER / _RUN}: format_version must be {_VERSION}")
    return cast(RunState | None, state)
