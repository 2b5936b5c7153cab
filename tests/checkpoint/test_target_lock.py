"""The lock of a result's place: who has it, and that it ends with its process."""

import os
import signal
import threading
from pathlib import Path

import pytest

from isoprune_hf.checkpoint.target_lock import TargetLock
from isoprune_hf.errors import OccupiedError


def start_holder(folder: Path) -> tuple[int, int]:
    """Start a process that locks the folder and has a child of its own; return the ids of both."""
    reading, writing = os.pipe()
    holder = os.fork()
    if holder == 0:
        lock = TargetLock(folder)
        lock.acquire("--output")
        if os.fork() == 0:  # the copy of the lock is closed in it before fork returns
            os.write(writing, f"{os.getpid()}\n".encode())
        while True:
            signal.pause()
    os.close(writing)
    with os.fdopen(reading) as pipe:
        return holder, int(pipe.readline())


def test_lock_is_released_and_acquired_again(tmp_path: Path) -> None:
    lock = TargetLock(tmp_path / "deep" / "out")
    for _ in range(2):
        lock.acquire("--output")
        assert [path.name for path in (tmp_path / "deep").iterdir()] == [".out.lock"]
        lock.release()
        assert list(tmp_path.iterdir()) == []
    other = TargetLock(tmp_path / "out")
    other.acquire("--output")
    TargetLock(tmp_path / "out").release()  # of one that does not hold it
    assert (tmp_path / ".out.lock").exists()
    other.release()


def test_lock_is_waited_for(tmp_path: Path) -> None:
    first, second = TargetLock(tmp_path / "out"), TargetLock(tmp_path / "out")
    first.acquire("--output")
    releasing = threading.Timer(0.1, first.release)
    releasing.start()
    second.acquire("--output", wait=10.0)
    releasing.join()
    second.release()


def test_lock_ends_with_its_killed_process(tmp_path: Path) -> None:
    """Also if a child, as a loader process, outlives the process that was killed."""
    holder, child = start_holder(tmp_path / "out")
    try:
        with pytest.raises(OccupiedError, match=rf"^--output x: process {holder} on \S+ "):
            TargetLock(tmp_path / "out").acquire("--output x")
        os.kill(holder, signal.SIGKILL)
        os.waitpid(holder, 0)
        lock = TargetLock(tmp_path / "out")
        lock.acquire("--output x")
        os.kill(child, 0)  # still alive
        lock.release()
    finally:
        os.kill(child, signal.SIGKILL)


def test_removed_lock_file_is_not_the_lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The holder removes its file after another process has opened it: the other one must lock the new file."""
    first, second = TargetLock(tmp_path / "out"), TargetLock(tmp_path / "out")
    first.acquire("--output")
    ordinary = os.open

    def open_late(*arguments: object) -> int:
        descriptor = ordinary(*arguments)
        monkeypatch.setattr(os, "open", ordinary)
        first.release()
        return descriptor

    monkeypatch.setattr(os, "open", open_late)
    second.acquire("--output")
    with pytest.raises(OccupiedError):
        TargetLock(tmp_path / "out").acquire("--output")
    second.release()
    assert list(tmp_path.iterdir()) == []
