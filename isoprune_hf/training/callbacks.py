"""Callbacks of the trainer: log, signals, snapshots and checkpoints.

The order matters where a process may be killed between two of them: the log of an update is written before its
snapshot, since a resumed run drops the log after its snapshot and writes it again.
"""

import signal
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

from accelerate.logging import get_logger
from torch import nn

from isoprune_hf.checkpoint.snapshots import Snapshot
from isoprune_hf.data.epochs import TrainBatches
from isoprune_hf.errors import RecipeError
from isoprune_hf.terminal import has_bars
from isoprune_hf.training.interruption import Interruption
from isoprune_hf.training.log import Clock
from isoprune_hf.training.progress import Entry, Progress, Update
from isoprune_hf.training.run import TrainingRun
from isoprune_hf.training.state import capture, restore

if TYPE_CHECKING:
    from isoprune_hf.training.trainer import Trainer

logger = get_logger(__name__)

SaveCheckpoint = Callable[[str, nn.Module, dict[str, Any]], None]


class Callback:
    """Hooks of `Trainer.fit`, called on all ranks; by default they do nothing."""

    def on_resume(self, trainer: "Trainer") -> None:
        """Restore the state of an earlier process; called before all other hooks."""

    def on_fit_begin(self, trainer: "Trainer") -> None:
        """Called before the first evaluation."""

    def during_epoch(self) -> AbstractContextManager[None]:
        """Return a context for the updates of an epoch, including `on_updates_end`."""
        return nullcontext()

    def stop_signal(self) -> signal.Signals | None:
        """Return the signal for which this rank asks all ranks to stop after the current update."""
        return None

    def on_update_end(self, trainer: "Trainer", update: Update, batches: TrainBatches) -> None:
        """Called after each update; with `update.signal`, it is the last one."""

    def on_updates_end(self, trainer: "Trainer", *, is_stopped: bool) -> None:
        """Called after the last update of an epoch, or of the process if a signal has stopped it."""

    def on_record(self, trainer: "Trainer", entry: Entry) -> None:
        """Called with the entry of each evaluation before training and of each finished epoch."""

    def on_checkpoint(self, name: str, model: nn.Module, entry: Entry) -> None:
        """Called after each epoch with the models to save."""


class LogCallback(Callback):
    """Writes updates and epochs to the log of a run, on the main process."""

    def __init__(self, run: TrainingRun):
        self._run = run
        self._clock = Clock()

    def on_fit_begin(self, trainer: "Trainer") -> None:
        if trainer.accelerator.is_main_process:
            progress = trainer.progress
            is_new = progress == Progress()
            self._run.log.open(*((0, 0) if is_new else (progress.epoch, progress.update)))

    def during_epoch(self) -> AbstractContextManager[None]:
        self._clock = Clock()
        return nullcontext()

    def on_update_end(self, trainer: "Trainer", update: Update, batches: TrainBatches) -> None:
        self._clock.count()
        if not trainer.accelerator.is_main_process:
            return
        run, progress, updates = self._run, trainer.progress, trainer.updates_per_epoch
        step = (progress.epoch - 1) * updates + progress.update
        place: Entry = {"epoch": progress.epoch, "update": progress.update}
        if progress.update % run.settings.log_every == 0 or update.fault is not None:
            entry = {**place, **update.figures, **run.measure_compute(update.figures["images_per_second"])}
            run.log.write(entry, step=step)
            if update.fault is None and not has_bars():
                logger.info(self._clock.describe(entry, remaining=trainer.recipe.epochs * updates - step))
        if update.broken:
            names = [batches.loader.images.describe(position) for position in update.broken]
            run.log.write({**place, "broken": names}, step=step)

    def on_record(self, trainer: "Trainer", entry: Entry) -> None:
        if trainer.accelerator.is_main_process:
            self._run.log.write(entry, step=entry["epoch"] * trainer.updates_per_epoch)
            self._run.log.write_table()


class SignalCallback(Callback):
    """Stops all ranks after an update when one rank has received a signal."""

    def __init__(self, interruption: Interruption):
        self._interruption = interruption

    @contextmanager
    def during_epoch(self) -> Iterator[None]:
        """Defer signals to the end of the epoch's updates; raise Interrupted there if one was received."""
        with self._interruption.deferred():
            yield

    def stop_signal(self) -> signal.Signals | None:
        return self._interruption.received()

    def on_update_end(self, trainer: "Trainer", update: Update, batches: TrainBatches) -> None:
        if update.signal is not None:
            self._interruption.signal = self._interruption.signal or update.signal

    def on_updates_end(self, trainer: "Trainer", *, is_stopped: bool) -> None:
        progress = trainer.progress
        self._interruption.position = (
            f"update {progress.update} of {trainer.updates_per_epoch} of epoch {progress.epoch} is saved; rerun the "
            "same command to resume"
        )


class SnapshotCallback(Callback):
    """Writes snapshots of a run on the main process, and restores the newest one on all ranks."""

    def __init__(self, run: TrainingRun):
        self._run = run

    def on_resume(self, trainer: "Trainer") -> None:
        snapshot = self._run.newest_snapshot()
        if snapshot is None:
            return
        saved, current = snapshot.values["split"], self._split(trainer)
        if saved["batch_size"] != current["batch_size"]:
            raise RecipeError(
                f"finetune.batch_size: the run was started on {saved['ranks']} ranks with updates of "
                f"{saved['batch_size']} images; on {current['ranks']} ranks they have {current['batch_size']}; start "
                f"{saved['ranks']} ranks"
            )
        trainer.progress = restore(trainer.student, snapshot)
        logger.info(f"resuming after update {trainer.progress.update} of epoch {trainer.progress.epoch}")
        if saved["ranks"] != current["ranks"]:
            note = "" if saved["parts"] == current["parts"] else ", in other parts: set finetune.virtual_replicas"
            logger.warning(
                f"the run was started on {saved['ranks']} ranks and resumes on {current['ranks']}: the same images in "
                f"the same order, but sums are rounded differently{note}"
            )

    def on_update_end(self, trainer: "Trainer", update: Update, batches: TrainBatches) -> None:
        number = trainer.progress.update
        is_last = update.signal is not None or number == trainer.updates_per_epoch  # `on_updates_end` follows
        if trainer.accelerator.is_main_process and not is_last and self._run.is_snapshot_due(number):
            self._run.save_snapshot(self._capture(trainer))

    def on_updates_end(self, trainer: "Trainer", *, is_stopped: bool) -> None:
        if trainer.accelerator.is_main_process:
            self._run.save_snapshot(self._capture(trainer), is_last=is_stopped)
        if is_stopped:
            trainer.accelerator.wait_for_everyone()  # the first rank to exit ends the others

    def _capture(self, trainer: "Trainer") -> Snapshot:
        return capture(trainer.student, trainer.progress, split=self._split(trainer))

    def _split(self, trainer: "Trainer") -> dict[str, int]:
        return {"batch_size": trainer.batch_size, "parts": trainer.parts, "ranks": trainer.ranks.world}


class CheckpointCallback(Callback):
    """Passes the models of each epoch to a function that saves them."""

    def __init__(self, save: SaveCheckpoint):
        self._save = save

    def on_checkpoint(self, name: str, model: nn.Module, entry: Entry) -> None:
        self._save(name, model, entry)
