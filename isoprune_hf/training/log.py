"""What a training says of itself: a file of JSON lines, the same as CSV, a picture of the curves, and a tracker."""

import csv
import io
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from accelerate.logging import get_logger
from accelerate.tracking import LOGGER_TYPE_TO_CLASS

from isoprune_hf.checkpoint.folder import replace_file, write_file

logger = get_logger(__name__)

LINES, TABLE, CURVES = "log.jsonl", "log.csv", "curves.png"
Entry = dict[str, Any]


class TrainingLog:
    """Keeps the entries of a run in its folder; on the main process alone.

    An entry of an update has `epoch` and `update`, counted from 1; one of an epoch has `epoch` alone. Nothing that
    fails here ends the training.

    Args:
        folder: Where the files are.
        tracker: Name of a tracker of accelerate, as tensorboard, trackio or wandb.
        settings: What the tracker is told of the run: plain values.
    """

    def __init__(self, folder: Path, *, tracker: str | None = None, settings: dict[str, Any] | None = None):
        self._folder, self._name, self._settings = folder, tracker, settings or {}
        self._tracker: Any = None

    def open(self, epoch: int, update: int) -> None:
        """Go on behind an update: entries that a killed process has left beyond it leave, they come again."""
        place = (epoch, update)
        entries = [entry for entry in read_log(self._folder) if _place(entry) <= place]
        self._attempt(
            lambda: write_file(self._folder / LINES, "".join(json.dumps(entry) + "\n" for entry in entries)), "the log"
        )
        if self._name is not None:
            self._attempt(self._start_tracker, f"the tracker {self._name}")

    def write(self, entry: Entry, *, step: int) -> None:
        """Add an entry, numbered by the updates of the whole training for the tracker."""

        def append() -> None:
            with (self._folder / LINES).open("a") as file:
                file.write(json.dumps(entry) + "\n")

        self._attempt(append, "the log")
        if self._tracker is not None:
            self._attempt(lambda: self._tracker.log(entry, step=step), f"the tracker {self._name}")

    def write_table(self) -> None:
        """Write all entries as CSV, one column for each name."""
        entries = read_log(self._folder)
        names = list(dict.fromkeys(name for entry in entries for name in entry))
        text = io.StringIO()
        table = csv.DictWriter(text, names, lineterminator="\n")
        table.writeheader()
        table.writerows(entries)
        self._attempt(lambda: write_file(self._folder / TABLE, text.getvalue()), "the log")

    def draw(self) -> None:
        """Draw the curves of the epochs, where matplotlib is installed."""
        self._attempt(self._draw, "the picture of the curves")

    def close(self) -> None:
        """End the tracker."""
        if self._tracker is not None:
            self._attempt(self._tracker.finish, f"the tracker {self._name}")
            self._tracker = None

    def _start_tracker(self) -> None:
        kind = LOGGER_TYPE_TO_CLASS[self._name]
        options = {"logging_dir": str(self._folder)} if kind.requires_logging_directory else {}
        self._tracker = kind("isoprune", **options)
        self._tracker.start()
        plain = {n: v if isinstance(v, int | float | str | bool) else str(v) for n, v in self._settings.items()}
        self._tracker.store_init_configuration(plain)

    def _draw(self) -> None:
        try:
            from matplotlib import figure
        except ImportError:
            return
        entries = read_log(self._folder)
        picture = figure.Figure(figsize=(9, 3.2), layout="constrained")
        left, right = picture.subplots(1, 2)
        for axes, names in ((left, ("train_loss", "loss", "raw_loss", "ema_loss")), (right, ("top1", "top5"))):
            for name in names:
                points = [(e["epoch"], e[name]) for e in entries if name in e and "update" not in e]
                if points:
                    axes.plot(*zip(*points, strict=True), marker=".", label=name)
            axes.set_xlabel("epoch")
            if axes.lines:
                axes.legend()
        replace_file(self._folder / CURVES, lambda path: picture.savefig(path, format="png", dpi=120))

    def _attempt(self, work: Callable[[], object], what: str) -> None:
        try:
            work()
        except Exception as error:  # noqa: BLE001 - a tracker may raise anything, and the training is worth more
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            logger.warning(f"{what} failed ({type(error).__name__}: {reason}); training goes on")
            if what.startswith("the tracker"):
                self._tracker = None


def read_log(folder: Path) -> list[Entry]:
    """Read the entries; a last line that a kill has cut off does not count."""
    if not (folder / LINES).is_file():
        return []
    entries = []
    for line in (folder / LINES).read_text().splitlines():
        try:
            entries.append(json.loads(line))
        except ValueError:
            break
    return entries


def _place(entry: Entry) -> tuple[int, float]:
    """An epoch's own entry comes behind those of its updates."""
    return entry["epoch"], entry.get("update", float("inf"))


class Clock:
    """Tells how much longer a training takes, from the updates of this process."""

    def __init__(self) -> None:
        self._start, self._updates = time.monotonic(), 0

    def describe(self, entry: Entry, *, left: int) -> str:
        """Write the line of an update, with the time that `left` further ones will take."""
        seconds = left * (time.monotonic() - self._start) / max(1, self._updates)
        speed = f"{entry['images_per_second']:.0f} images/s, {entry['data_wait']:.0%} of the time waiting for data"
        speed += f", {entry['mfu']:.0%} of the peak" if "mfu" in entry else ""
        return (
            f"epoch {entry['epoch']} update {entry['update']}: loss {entry['loss']:.4g}, lr {entry['lr']:.4g}, "
            f"{speed}, {format_seconds(seconds)} left"
        )

    def count(self) -> None:
        self._updates += 1


def format_seconds(seconds: float) -> str:
    """Write a time as people say it: 42 s, 12 min, 3.5 h, 2.1 days."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    for unit, size, below in (("min", 60, 100), ("h", 3600, 48)):
        if seconds < below * size:
            return f"{seconds / size:.{0 if unit == 'min' else 1}f} {unit}"
    return f"{seconds / 86400:.1f} days"
