"""The log: every entry is written once, in readable files, even if the tracker fails."""

import csv
import json
import logging
from pathlib import Path
from typing import Any

import pytest
from accelerate import Accelerator, tracking
from PIL import Image

from isoprune_hf.training.log import Clock, TrainingLog, describe_epoch, read_log

ACCELERATOR = Accelerator(cpu=True)  # the log of ranks needs one
ENTRIES: list[dict[str, Any]] = [
    {"epoch": 0, "top1": 0.1},
    {"epoch": 1, "update": 1, "loss": 2.5},
    {"epoch": 1, "update": 2, "loss": 2.25},
    {"epoch": 1, "train_loss": 2.375, "top1": 0.5},
    {"epoch": 2, "update": 1, "loss": 2.0},
]


def fill(log: TrainingLog) -> TrainingLog:
    log.open(0, 0)
    for step, entry in enumerate(ENTRIES):
        log.write(entry, step=step)
    return log


def test_the_lines_and_the_table_hold_every_entry(tmp_path: Path) -> None:
    log = fill(TrainingLog(tmp_path))
    log.write_table()
    log.draw()
    assert [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()] == ENTRIES
    with (tmp_path / "log.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [{key: float(value) for key, value in row.items() if value} for row in rows] == ENTRIES
    with Image.open(tmp_path / "curves.png") as picture:
        assert picture.format == "PNG" and picture.width > 500


@pytest.mark.parametrize(
    ("place", "kept"), [((0, 0), 0), ((1, 0), 1), ((1, 1), 2), ((1, 2), 3), ((2, 0), 4), ((2, 9), 5)]
)
def test_resuming_drops_later_log_entries(place: tuple[int, int], kept: int, tmp_path: Path) -> None:
    fill(TrainingLog(tmp_path))
    with (tmp_path / "log.jsonl").open("a") as file:
        file.write('{"epoch": 2, "upd')  # a kill has cut it off
    log = TrainingLog(tmp_path)
    log.open(*place)
    log.write({"epoch": 9}, step=9)
    assert read_log(tmp_path) == [*ENTRIES[:kept], {"epoch": 9}]


class Tracker:
    """A tracker with the interface of accelerate's that fails in one chosen call."""

    requires_logging_directory = True
    failing = ""
    calls: tuple[Any, ...] = ()

    def __init__(self, name: str, logging_dir: str):
        self._say("init", name, logging_dir)

    def start(self) -> None:
        self._say("start")

    def store_init_configuration(self, values: dict[str, Any]) -> None:
        self._say("settings", values)

    def log(self, values: dict[str, Any], step: int) -> None:
        self._say("log", values, step)

    def finish(self) -> None:
        self._say("finish")

    def _say(self, what: str, *arguments: Any) -> None:
        Tracker.calls += ((what, *arguments),)
        if what == Tracker.failing:
            raise ConnectionError("the server is down\nsee there")


@pytest.mark.parametrize("failing", ["", "init", "start", "settings", "log", "finish"])
def test_tracker_gets_every_entry_or_warns_once(
    failing: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(tracking.LOGGER_TYPE_TO_CLASS, "trackio", Tracker)
    monkeypatch.setattr(Tracker, "failing", failing)
    monkeypatch.setattr(Tracker, "calls", ())
    log = fill(TrainingLog(tmp_path, tracker="trackio", settings={"lr": 0.1, "size": [1, 2]}))
    log.close()
    log.close()
    assert read_log(tmp_path) == ENTRIES
    warnings = [
        record.getMessage().removeprefix("[RANK 0] ") for record in caplog.records if record.levelno == logging.WARNING
    ]
    if failing:
        assert warnings == ["the tracker trackio failed (ConnectionError: the server is down); training continues"]
    else:
        assert warnings == []
        assert Tracker.calls[:3] == (
            ("init", "isoprune", str(tmp_path)),
            ("start",),
            ("settings", {"lr": 0.1, "size": "[1, 2]"}),
        )
        assert Tracker.calls[3:] == (*[("log", entry, step) for step, entry in enumerate(ENTRIES)], ("finish",))


def test_missing_tracker_is_one_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    fill(TrainingLog(tmp_path, tracker="wandb")).close()
    assert read_log(tmp_path) == ENTRIES
    assert caplog.text.count("the tracker wandb failed (ModuleNotFoundError") == 1


def test_unwritable_log_does_not_stop_training(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "log.jsonl").mkdir()
    fill(TrainingLog(tmp_path))
    assert "the log failed (" in caplog.text and "training continues" in caplog.text


def test_log_line_estimates_the_remaining_time(monkeypatch: pytest.MonkeyPatch) -> None:
    times = iter([100.0, 130.0])
    monkeypatch.setattr("time.monotonic", lambda: next(times))
    clock = Clock()
    for _ in range(10):
        clock.count()
    entry = {"epoch": 2, "update": 10, "loss": 1.5, "lr": 0.1, "images_per_second": 811.6, "data_wait": 0.034}
    line = clock.describe(entry, remaining=400)
    assert line == ("epoch 2 update 10: loss 1.5, lr 0.1, 812 images/s, 3% of the time waiting for data, 20 min left")


def test_line_of_an_epoch_shows_whole_numbers() -> None:
    entry = {"epoch": 3, "train_loss": 1.23456, "images_per_second": 1811.6, "top1": 0.12345, "images": 10000}
    assert describe_epoch(entry) == "epoch 3: train_loss 1.235, 1,812 images/s, top1 12.35%, images 10,000"
