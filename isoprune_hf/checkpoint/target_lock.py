"""The lock of a result's place: one process at a time writes there; see `TargetLock`."""

import contextlib
import os
import socket
from pathlib import Path

from filelock import FileLock, Timeout

from isoprune_hf.errors import OccupiedError


class TargetLock:
    """An exclusive lock on a place that may not exist yet: a file next to it, removed when the lock is released.

    The operating system releases the lock when the process ends, however it ends; the file of a killed process is
    taken over by the next one.

    Args:
        target: The place; missing parents are created by `acquire`, and removed by `release` if they are empty.
    """

    def __init__(self, target: Path):
        self._file = target.parent / f".{target.name}.lock"
        self._lock = FileLock(self._file, thread_local=False)
        self._made = [folder for folder in target.parents if not folder.exists()]

    def acquire(self, what: str, *, wait: float = 0.0) -> None:
        """Acquire the lock.

        Args:
            what: Start of the message of the error.
            wait: Seconds to wait for another process that has the lock.

        Raises:
            OccupiedError: Another process has the lock; names it and its host.
            OSError: The lock file cannot be written.
        """
        while True:
            self._file.parent.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(self._file, os.O_RDWR | os.O_CREAT, 0o644)
            try:
                self._lock.acquire(timeout=wait)
                if self._is_current(descriptor):
                    with contextlib.suppress(OSError):  # Windows locks the content as well
                        os.ftruncate(descriptor, 0)
                        os.write(descriptor, f"process {os.getpid()} on {socket.gethostname()}".encode())
                    return
                self._lock.release()
            except Timeout as error:
                raise OccupiedError(f"{what}: {self._holder()} is writing there") from error
            finally:
                os.close(descriptor)

    def release(self) -> None:
        """Release the lock, and remove its file and the folders that were made for it; nothing if it is not held."""
        if not self._lock.is_locked:
            return
        with contextlib.suppress(OSError):  # Windows removes no open file
            self._file.unlink()
        self._lock.release()
        for folder in self._made:
            with contextlib.suppress(OSError):
                folder.rmdir()

    def _is_current(self, descriptor: int) -> bool:
        """Return whether the locked file is still the one of this name, and not one that its holder has removed.

        A file that is open keeps its number, and a removed name never returns to it.
        """
        try:
            return os.path.samestat(os.fstat(descriptor), self._file.stat())
        except FileNotFoundError:
            return False

    def _holder(self) -> str:
        try:
            return self._file.read_text(encoding="utf-8").strip() or "another process"
        except OSError:
            return "another process"
