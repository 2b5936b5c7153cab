"""Run the models of `coverage.py`, each in a process of its own, and record a row for each."""

import json
import multiprocessing
import os
import resource
import signal
import subprocess
import tempfile
import time
from collections.abc import Sequence
from importlib.metadata import version
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from coverage_case import open_case, prepare, run_way
from coverage_models import Case
from coverage_record import Record
from coverage_table import WAYS, read_rows
from PIL import Image

RESULTS = Path(__file__).parent / "results"
LIBRARIES = ("torch", "timm", "transformers", "torchvision")
_FORK = multiprocessing.get_context("fork")  # the imports are done once for all models

Row = dict[str, Any]


class Run:
    """The processes of one run: one for each model, which forks one for each way once the base is open.

    Args:
        images: Calibration images, then held-out images.
        seconds: CPU seconds of a way.
        gigabytes: Address space of a process.
    """

    def __init__(self, images: list[Image.Image], seconds: int, gigabytes: float):
        self._images, self._seconds, self._bytes = images, seconds, int(gigabytes * 2**30)
        self._running: dict[int, tuple[BaseProcess, Case, tempfile.TemporaryDirectory[str], float]] = {}

    def __len__(self) -> int:
        return len(self._running)

    def start(self, case: Case, ways: Sequence[str] = WAYS) -> None:
        """Start the process of a model, which prunes it in some ways."""
        folder = tempfile.TemporaryDirectory()
        process = _FORK.Process(target=self._run_model, args=(case, ways, Path(folder.name)))
        process.start()
        self._running[process.sentinel] = (process, case, folder, time.monotonic())

    def wait(self) -> list[Row]:
        """Wait until at least one model is done, and return the rows of those that are."""
        rows = []
        for sentinel in wait(list(self._running)):
            process, case, folder, start = self._running.pop(int(sentinel))  # type: ignore[call-overload]
            process.join()
            with folder:
                row = read_records(case, Path(folder.name), process.exitcode)
            rows.append(row | {"wall_s": round(time.monotonic() - start, 1)})
        return rows

    def _run_model(self, case: Case, ways: Sequence[str], folder: Path) -> None:
        self._limit()
        record = Record(folder / "load")
        with record.measured():
            base, images, outputs = open_case(case, self._images, record)
            record.add(step="done")
            for way in ways:
                process = _FORK.Process(target=self._run_way, args=(way, base, images, outputs, folder / way))
                process.start()
                process.join()
                if process.exitcode:
                    Record(folder / way).add(**_death(process.exitcode))

    def _run_way(self, way: str, base: Any, images: Any, outputs: Any, path: Path) -> None:
        self._limit()
        record = Record(path)
        with record.measured():
            run_way(way, base, images, outputs, record)

    def _limit(self) -> None:
        prepare()
        null = os.open(os.devnull, os.O_WRONLY)
        for stream in (1, 2):
            os.dup2(null, stream)
        resource.setrlimit(resource.RLIMIT_CPU, (self._seconds, self._seconds + 5))
        resource.setrlimit(resource.RLIMIT_AS, (self._bytes, self._bytes))
        signal.signal(signal.SIGXCPU, signal.SIG_DFL)


def _death(code: int) -> Row:
    """Return the record of a process that ended before its steps."""
    if code == -signal.SIGXCPU:
        return {"kind": "limit", "type": "SIGXCPU", "error": "not done in the limit of CPU time"}
    return {"kind": "limit", "type": f"exit {code}", "error": f"the process ended with code {code}"}


def read_records(case: Case, folder: Path, code: int | None) -> Row:
    """Return the row of a model from the records of its processes."""
    row: Row = {"name": case.name, "library": case.library, "family": case.family}
    load = _read_record(folder / "load")
    row["load"] = load if not code else load | _death(code)
    for way in WAYS:
        if (folder / way).exists():
            row[way] = _read_record(folder / way)
    return row


def _read_record(path: Path) -> Row:
    values: Row = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        values |= json.loads(line)
    return values


def versions() -> str:
    """Return the commit of this code and the versions of the libraries."""
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False
    ).stdout
    return " ".join([commit.strip() or "no commit", *(f"{name} {version(name)}" for name in LIBRARIES)])


def run_cases(todo: Sequence[tuple[Case, Sequence[str]]], run: Run, workers: int, results: Path) -> None:
    """Run the ways of each case, some cases at a time, and append their rows to a file.

    The records of the other ways are those of the row before, each with the versions with which it was made.
    """
    results.parent.mkdir(parents=True, exist_ok=True)
    waiting, stamp, before = list(todo), versions(), read_rows(results)
    with results.open("a", encoding="utf-8") as file:
        while waiting or len(run):
            while waiting and len(run) < workers:
                run.start(*waiting.pop(0))
            for row in run.wait():
                row = joined(before.get(row["name"]), row | {"versions": stamp})
                file.write(json.dumps(row) + "\n")
                file.flush()
                print(describe_row(row), f"({len(waiting)} to go)", flush=True)


def joined(before: Row | None, row: Row) -> Row:
    """Return a row with the records of the ways that only the row before it has, and their versions."""
    if before is None:
        return row
    kept = {way: {"versions": before["versions"]} | before[way] for way in WAYS if way in before and way not in row}
    return row | kept


def known_rows(population: str, results: Path) -> dict[str, Row]:
    """Return the rows of a population; those of the anchor are some of the rows of `named`."""
    shared = read_rows(results.with_name("coverage_anchor.jsonl")) if population == "named" else {}
    return shared | read_rows(results)


def describe_row(row: Row) -> str:
    """Return a row in one line."""
    states = []
    for part in ("load", *WAYS):
        record = row.get(part, {})
        cost = f"{record.get('cpu_s', '-')} s {record.get('peak_mb', '-')} MB"
        states.append(f"{part}: {record.get('step', 'not run')} {record.get('error', '')} [{cost}]")
    return f"{row['name']}  {'  '.join(states)}"
