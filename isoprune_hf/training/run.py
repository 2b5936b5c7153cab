"""A training that outlives its process: who trains in a folder, what, how far it has come, and what it has logged."""

import fcntl
import json
import os
import shutil
import socket
import time
from pathlib import Path
from types import TracebackType
from typing import Any, TextIO

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
    IsoPruneError,
    OccupiedError,
    RecipeError,
    WriteError,
)
from isoprune_hf.training.interruption import Interruption
from isoprune_hf.training.log import TrainingLog

logger = get_logger(__name__)

RUN_FOLDER = "training"  # inside the checkpoints of an output
_RUN, _LOCK = "run.json", "lock"
_VERSION = 1


class TrainingRun:
    """Holds the folder of a run while its block lasts; all ranks open it, the main process alone writes.

    Args:
        checkpoints: Folder of the model's checkpoints; the run is in `training` inside it.
        identity: What is trained, by the names of the settings: a run goes on only with the same.
        accelerator: The ranks.
        overwrite: Another run that is there is replaced instead of refused.
        every: Updates between two snapshots, beside those at the end of each epoch.
        minutes: The same in time.
        max_minutes: Time after which the run ends as by a signal.
        log_every: Updates between two that are logged.
        tracker: Name of a tracker for the log, beside its files.
        flops: Floating-point operations that training on one image takes, the teacher's among them, for the log.
        peak_tflops: What one device could do, in 10^12 of them in a second.

    Raises:
        OccupiedError: Another process trains there, or nothing can be written there.
        RecipeError: The run that is there, and not finished, trains something else.
    """

    def __init__(
        self,
        checkpoints: Path,
        identity: dict[str, Any],
        accelerator: Accelerator,
        *,
        overwrite: bool = False,
        every: int | None = None,
        minutes: float | None = None,
        max_minutes: float | None = None,
        log_every: int = 50,
        tracker: str | None = None,
        flops: float | None = None,
        peak_tflops: float | None = None,
    ):
        self.checkpoints, self.folder = checkpoints, checkpoints / RUN_FOLDER
        self.interruption = Interruption(max_minutes)
        self._identity = json.loads(json.dumps(identity))  # as it is read again
        self._accelerator, self._overwrite = accelerator, overwrite
        self._every, self._minutes, self._last = every, minutes, time.monotonic()
        self._digest = xxhash.xxh3_128(json.dumps(identity, sort_keys=True).encode()).hexdigest()
        self._lock: TextIO | None = None
        self.log_every = log_every
        self._flops, self._peak = flops, peak_tflops
        self.log = TrainingLog(self.folder, tracker=tracker, settings=self._identity)

    def __enter__(self) -> "TrainingRun":
        self._accelerator.wait_for_everyone()  # each has looked at what is there
        if self._accelerator.is_main_process:
            try:
                self._take()
                self._begin()
            except OSError as error:
                raise OccupiedError(f"--output: {self.folder} cannot be written ({error.strerror})") from error
        self._accelerator.wait_for_everyone()
        self.interruption.__enter__()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.interruption.__exit__(kind, error, trace)
        if self._lock is None:
            return
        if isinstance(error, IsoPruneError) and not self.is_finished and not has_snapshots(self.folder):
            # Nothing was done that could be continued, so nothing is left.
            shutil.rmtree(self.folder, ignore_errors=True)
            for folder in (self.checkpoints, self.checkpoints.parent):
                if folder.is_dir() and not any(folder.iterdir()):
                    folder.rmdir()
        self.log.close()
        self._lock.close()
        self._lock = None

    @property
    def is_finished(self) -> bool:
        """Whether the result of this very run has been written."""
        state = read_run(self.checkpoints)
        return state is not None and state["finished"] and state["identity"] == self._identity

    def _take(self) -> None:
        """Take the lock; the system gives it back when the process ends, however it ends."""
        self.folder.mkdir(parents=True, exist_ok=True)
        lock = (self.folder / _LOCK).open("a+")
        try:
            # Of the process, not of the open file: loader processes that outlive a killed one do not hold it.
            fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            lock.seek(0)
            holder = lock.read().strip() or "another process"
            lock.close()
            raise OccupiedError(f"--output {self.checkpoints.parent}: {holder} is training there") from error
        lock.truncate(0)
        lock.write(f"process {os.getpid()} on {socket.gethostname()}")
        lock.flush()
        self._lock = lock

    def _begin(self) -> None:
        """Continue the run that is there, or begin one."""
        state = read_run(self.checkpoints)
        is_begun = state is not None and not state["finished"] and has_snapshots(self.folder)
        if is_begun and state["identity"] != self._identity and not self._overwrite:
            self._refuse(state["identity"])
        remove_leftovers(self.folder)
        output = self.checkpoints.parent
        for parent, name in ((self.checkpoints, "*"), (output.parent, output.name)):  # of killed writers
            for path in (*parent.glob(f".{name}.*.tmp"), *parent.glob(f".{name}.*.old")):
                shutil.rmtree(path, ignore_errors=True)
        if state is not None and not state["finished"] and state["identity"] == self._identity:
            return
        # This is the moment from which the snapshots of an older run count no more.
        self._write_state(finished=False)
        for path in self.checkpoints.iterdir():
            if path.name != RUN_FOLDER:
                shutil.rmtree(path, ignore_errors=True)
        for path in self.folder.iterdir():
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            elif path.name not in (_RUN, _LOCK):
                path.unlink()

    def _refuse(self, known: dict[str, Any]) -> None:
        changed = [name for name in sorted({*known, *self._identity}) if known.get(name) != self._identity.get(name)]
        values = "; ".join(f"{name} was {known.get(name)}, got {self._identity.get(name)}" for name in changed[:3])
        self._lock.close()
        self._lock = None
        raise RecipeError(
            f"--output {self.checkpoints.parent} holds an unfinished run with other settings: {values}; give the old "
            "values to continue it, choose another folder, or replace it with --overwrite true"
        )

    def _write_state(self, *, finished: bool) -> None:
        state = {"format_version": _VERSION, "finished": finished, "identity": self._identity}
        write_file(self.folder / _RUN, json.dumps(state, indent=2, sort_keys=True) + "\n")

    def read(self) -> Snapshot | None:
        """Read the newest intact snapshot, the same on all ranks; None at the beginning of a run.

        Raises:
            DamagedStateError: There are snapshots, and none is intact.
        """
        place, found = torch.full((2,), -1, device=self._accelerator.device), None
        if self._accelerator.is_main_process:
            try:
                found = read_newest_snapshot(self.folder, run=self._digest)
            except DamagedStateError:
                if not self._overwrite:
                    raise
                logger.warning(f"no training state in {self.folder} is intact: beginning anew, as --overwrite says")
                remove_snapshots(self.folder)
            if found is not None:
                place.copy_(torch.tensor([found.epoch, found.update]))
        epoch, update = broadcast(place).tolist()
        if epoch < 0 or self._accelerator.is_main_process:
            return found
        return read_snapshot(self.folder, epoch, update)

    def measure_compute(self, images_per_second: float) -> dict[str, float]:
        """Say what a speed is in 10^12 operations a second (`tflops`), and as a share of all devices' peak (`mfu`).

        Source:
            Chowdhery et al., PaLM, 2022 (arXiv 2204.02311), section 4.1: what is recomputed does not count.
        """
        if self._flops is None:
            return {}
        tflops = images_per_second * self._flops / 1e12
        if self._peak is None:
            return {"tflops": tflops}
        return {"tflops": tflops, "mfu": tflops / (self._peak * self._accelerator.num_processes)}

    def is_due(self, update: int) -> bool:
        """Say whether a snapshot is due after so many updates of an epoch; asked on the main process."""
        late = self._minutes is not None and time.monotonic() - self._last >= 60 * self._minutes
        return late or (self._every is not None and update % self._every == 0)

    def write(self, snapshot: Snapshot, *, is_last: bool = False) -> None:
        """Write a snapshot; a disk that is full costs no more than a warning, unless it is the last one.

        Raises:
            WriteError: The last one cannot be written.
        """
        try:
            write_snapshot(self.folder, snapshot, run=self._digest)
        except OSError as error:
            text = f"the training state {snapshot.name} cannot be written to {self.folder} ({error.strerror or error})"
            if is_last:
                raise WriteError(f"{text}; the one before it is still there") from error
            logger.warning(f"{text}; training goes on, and it is tried again at the next one")
        self._last = time.monotonic()

    def finish(self) -> None:
        """Note that the result is written, and remove the snapshots; the log stays."""
        if self._accelerator.is_main_process:
            self._write_state(finished=True)
            remove_snapshots(self.folder)
            self.log.draw()
        self._accelerator.wait_for_everyone()


def is_begun(checkpoints: Path) -> bool:
    """Say whether a run was ever begun in a folder, be it finished or killed at its first file."""
    return (checkpoints / RUN_FOLDER / _LOCK).is_file()


def read_run(checkpoints: Path) -> dict[str, Any] | None:
    """Read what is trained in a folder, and whether it is finished; None where nothing was begun.

    Raises:
        CheckpointError: The file is of no version that is known.
    """
    state = read_json(checkpoints / RUN_FOLDER, _RUN)
    if state is not None and (state.get("format_version") != _VERSION or {"finished", "identity"} - state.keys()):
        raise CheckpointError(f"{checkpoints / RUN_FOLDER / _RUN}: format_version must be {_VERSION}")
    return state
