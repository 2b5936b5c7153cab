"""The position of a training, and the result of one update."""

import signal
from dataclasses import dataclass, field
from typing import Any, NamedTuple

Entry = dict[str, Any]


@dataclass
class Progress:
    """Position of a training; the trainer changes it in place.

    Args:
        epoch: Current epoch, counted from 1.
        update: Number of finished updates in the epoch.
        losses: Sum of the losses of the epoch's samples.
        seconds: Time that the epoch has taken.
        waited: Part of it in which this process waited for data.
        history: Entries of the finished epochs.
        best_epoch: Best epoch so far, see `Judging.best`.
        best_top1: Figure of that epoch: top-1 of a classifier. Snapshots have it by this name.
        broken: Number of images of the epoch that could not be read.
        left_out: Number of samples in updates of the epoch that were skipped because they were not finite.
        faults: Number of consecutive skipped updates.
    """

    epoch: int = 1
    update: int = 0
    losses: float = 0.0
    seconds: float = 0.0
    waited: float = 0.0
    history: list[Entry] = field(default_factory=list)
    best_epoch: int = 0
    best_top1: float = -1.0
    broken: int = 0
    left_out: int = 0
    faults: int = 0

    def add(self, update: "Update", *, samples: int) -> None:
        """Count a finished update of so many samples."""
        self.update += 1
        self.waited += update.waited
        self.broken += len(update.broken)
        if update.fault is None:
            self.losses += update.loss * samples
            self.faults = 0
        else:
            self.left_out += samples
            self.faults += 1

    def start_next_epoch(self) -> None:
        """Move to the first update of the next epoch."""
        self.epoch += 1
        self.update = 0
        self.losses = 0.0
        self.seconds = 0.0
        self.waited = 0.0
        self.broken = 0
        self.left_out = 0


class Update(NamedTuple):
    """A finished update.

    Args:
        loss: Mean loss over the samples of all ranks.
        figures: Values for the log.
        signal: Signal for which all ranks stop after this update, if any.
        broken: Positions of the images of all ranks that could not be read.
        fault: Reason why the update was skipped, if it was.
        waited: Seconds in which this rank waited for data.
    """

    loss: float
    figures: dict[str, Any]
    signal: signal.Signals | None
    broken: list[int]
    fault: str | None = None
    waited: float = 0.0
