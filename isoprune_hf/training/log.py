"""The log of a training: JSON lines, the same as CSV, a picture of the curves, and a tracker; see `TrainingLog`."""

import csv
import io
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from accelerate.logging import get_logger
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, GeneralTracker

from isoprune_hf.checkpoint.folder import replace_file, write_file
from isoprune_hf.terminal import format_seconds
from isoprune_hf.training.progress import Entry

logger = get_logger(__name__)

LINES = "log.jsonl"
TABLE = "log.csv"
CURVES = "curves.png"


_FRACTIONS = ("top1", "top5", "map", "ece", "knn")  # ends of names


class TrainingLog:
    """Writes the entries of a run to files in its folder and to a tracker; used on the main process only.

    The entry of an update has `epoch` and `update`, counted from 1; the entry of an epoch has only `epoch`. A failure
    to write is logged as a warning and does not end the training.

    Args:
        folder: Folder of the files.
        tracker: Name of a tracker of accelerate, such as tensorboard, trackio or wandb.
        settings: Settings of the run that the tracker records.
    """

    def __init__(self, folder: Path, *, tracker: str | None = None, settings: dict[str, Any] | None = None):
        self._folder = folder
        self._tracker_name = tracker
        self._settings = settings or {}
        self._tracker: GeneralTracker | None = None

    def open(self, epoch: int, update: int) -> None:
        """Resume after `update`: drop entries written past it by a killed process; they will be written again."""
        position = (epoch, update)
        entries = [entry for entry in read_log(self._folder) if _position(entry) <= position]
        text = "".join(json.dumps(entry) + "\n" for entry in entries)
        self._attempt_file(lambda: write_file(self._folder / LINES, text))
        if self._tracker_name is not None:
            name = self._tracker_name
            self._attempt_tracker(lambda: self._start_tracker(name))

    def write(self, entry: Entry, *, step: int) -> None:
        """Add an entry; the tracker gets `step`, the number of updates of the whole training."""

        def append() -> None:
            with (self._folder / LINES).open("a", encoding="utf-8") as file:
                file.write(json.dumps(entry) + "\n")

        self._attempt_file(append)
        tracker = self._tracker
        if tracker is not None:
            self._attempt_tracker(lambda: tracker.log(entry, step=step))

    def write_table(self) -> None:
        """Write all entries as CSV, one column for each name."""
        entries = read_log(self._folder)
        names = list(dict.fromkeys(name for entry in entries for name in entry))
        text = io.StringIO()
        table = csv.DictWriter(text, names, lineterminator="\n")
        table.writeheader()
        table.writerows(entries)
        self._attempt_file(lambda: write_file(self._folder / TABLE, text.getvalue()))

    def draw(self) -> None:
        """Draw the curves of the epochs, if matplotlib is installed."""
        self._attempt_file(self._draw, "the picture of the curves")

    def close(self) -> None:
        """Close the tracker."""
        if self._tracker is not None:
            self._attempt_tracker(self._tracker.finish)
            self._tracker = None

    def _start_tracker(self, name: str) -> None:
        kind = LOGGER_TYPE_TO_CLASS[name]
        self._tracker = (
            kind("isoprune", logging_dir=str(self._folder)) if kind.requires_logging_directory else kind("isoprune")
        )
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
        for axes, names in (
            (left, ("train_loss", "loss", "raw_loss", "ema_loss")),
            (right, ("top1", "top5", "map", "cosine", "knn")),
        ):
            for name in names:
                points = [(e["epoch"], e[name]) for e in entries if name in e and "update" not in e]
                if points:
                    axes.plot(*zip(*points, strict=True), marker=".", label=name)
            axes.set_xlabel("epoch")
            if axes.lines:
                axes.legend()
        replace_file(self._folder / CURVES, lambda path: picture.savefig(path, format="png", dpi=120))

    def _attempt_file(self, write: Callable[[], object], name: str = "the log") -> None:
        try:
            write()
        except Exception as error:  # noqa: BLE001 - matplotlib may raise anything, and the training must continue
            _warn(name, error)

    def _attempt_tracker(self, work: Callable[[], object]) -> None:
        try:
            work()
        except Exception as error:  # noqa: BLE001 - a tracker may raise anything, and the training must continue
            _warn(f"the tracker {self._tracker_name}", error)
            self._tracker = None


def _warn(name: str, error: Exception) -> None:
    reason = (str(error).splitlines() or [type(error).__name__])[0]
    logger.warning(f"{name} failed ({type(error).__name__}: {reason}); training continues")


def read_log(folder: Path) -> list[Entry]:
    """Read the entries of a log, up to the first line that a killed process left incomplete."""
    if not (folder / LINES).is_file():
        return []
    entries = []
    for line in (folder / LINES).read_text(encoding="utf-8").splitlines():
        try:
            entries.append(json.loads(line))
        except ValueError:
            break
    return entries


def _position(entry: Entry) -> tuple[int, float]:
    """Return epoch and update of an entry; an epoch's own entry comes after its updates."""
    return entry["epoch"], entry.get("update", float("inf"))


class Clock:
    """Estimates the remaining time of a training from the updates since its creation."""

    def __init__(self) -> None:
        self._start = time.monotonic()
        self._updates = 0

    def describe(self, entry: Entry, *, remaining: int) -> str:
        """Return the log line of an update, with the time that `remaining` further updates will take."""
        seconds = remaining * (time.monotonic() - self._start) / max(1, self._updates)
        speed = f"{entry['images_per_second']:.0f} images/s, {entry['data_wait']:.0%} of the time waiting for data"
        speed += f", {entry['mfu']:.0%} of the peak" if "mfu" in entry else ""
        return (
            f"epoch {entry['epoch']} update {entry['update']}: loss {entry['loss']:.4g}, lr {entry['lr']:.4g}, "
            f"{speed}, {format_seconds(seconds)} left"
        )

    def count(self) -> None:
        """Count a finished update."""
        self._updates += 1


def describe_epoch(entry: Entry) -> str:
    """Return the log line of an epoch; fractions are shown in percent."""
    return f"epoch {entry['epoch']}: " + describe_figures({name: entry[name] for name in entry if name != "epoch"})


def describe_wait(epoch: int, share: float, *, workers: int, decoder: str) -> str:
    """Return the line about a loader that is too slow: the share of the time that is waiting, and what helps."""
    faster = ", or set data.decoder: torchvision" if decoder == "pil" else ""
    return (
        f"epoch {epoch}: the loader is the bottleneck, {share:.0%} of the time is waiting for data; raise "
        f"data.num_workers (now {workers}){faster}"
    )


def describe_figures(figures: Entry) -> str:
    """Return figures as one line; fractions are shown in percent."""
    return ", ".join(_describe(name, value) for name, value in figures.items())


def _describe(name: str, value: float) -> str:
    if name == "images_per_second":
        return f"{value:,.0f} images/s"
    if name.endswith(_FRACTIONS):
        return f"{name} {100 * value:.2f}%"
    return f"{name} {value:,}" if isinstance(value, int) else f"{name} {value:.4g}"
