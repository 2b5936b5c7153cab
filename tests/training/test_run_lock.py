"""The lock of a run: who has it, and that it ends with its process."""

import os
import signal
from pathlib import Path

import pytest

from isoprune_hf.errors import OccupiedError
from isoprune_hf.training.run_lock import RunLock, was_locked


def start_holder(folder: Path) -> tuple[int, int]:
    """Start a process that locks the folder and has a child of its own; return the ids of both."""
    reading, writing = os.pipe()
    holder = os.fork()
    if holder == 0:
        lock = RunLock(folder)
        lock.acquire("--output")
        child = os.fork()
        if child:
            os.write(writing, f"{child}\n".encode())
        while True:
            signal.pause()
    os.close(writing)
    with os.fdopen(reading) as pipe:
        return holder, int(pipe.readline())


def test_lock_is_released_and_acquired_again(tmp_path: Path) -> None:
    assert not was_locked(tmp_path)
    lock = RunLock(tmp_path)
    for _ in range(2):
        lock.acquire("--output")
        assert lock.is_held and was_locked(tmp_path)
        lock.release()
        assert not lock.is_held and was_locked(tmp_path)
    lock.release()


def test_lock_ends_with_its_killed_process(tmp_path: Path) -> None:
    """Also if a child, as a loader process, outlives the process that was killed."""
    holder, child = start_holder(tmp_path)
    try:
        with pytest.raises(OccupiedError, match=rf"^--output x: process {holder} on \S+ "):
            RunLock(tmp_path).acquire("--output x")
        os.kill(holder, signal.SIGKILL)
        os.waitpid(holder, 0)
        lock = RunLock(tmp_path)
        lock.acquire("--output x")
        os.kill(child, 0)  # still alive
        lock.release()
    finally:
        os.kill(child, signal.SIGKILL)
