"""The lock of a run's folder: one process at a time trains there; see `RunLock`."""

import os
import socket
from pathlib import Path

from filelock import FileLock, Timeout

from isoprune_hf.errors import OccupiedError

_LOCK = "lock"
# Next to the lock, since Windows locks the content of the lock file itself.
_HOLDER = "holder.lock"
LOCK_FILES = (_LOCK, _HOLDER)


class RunLock:
    """An exclusive lock on a folder.

    The operating system releases it when the process ends, however it ends. filelock closes its file in forked
    processes, so loader processes that outlive a killed process do not keep the lock.
    """

    def __init__(self, folder: Path):
        self._holder = folder / _HOLDER
        self._lock = FileLock(folder / _LOCK, timeout=0)

    def acquire(self, what: str) -> None:
        """Acquire the lock; `what` starts the message of the error.

        Raises:
            OccupiedError: Another process has the lock; names it and its host.
            OSError: The lock file cannot be written.
        """
        try:
            self._lock.acquire()
        except Timeout as error:
            try:
                holder = self._holder.read_text(encoding="utf-8").strip()
            except OSError:
                holder = ""
            raise OccupiedError(f"{what}: {holder or 'another process'} is writing there") from error
        self._holder.write_text(f"process {os.getpid()} on {socket.gethostname()}", encoding="utf-8")

    def release(self) -> None:
        """Release the lock; does nothing if it is not held."""
        self._lock.release()

    @property
    def is_held(self) -> bool:
        """True if this process has the lock."""
        return self._lock.is_locked


def was_locked(folder: Path) -> bool:
    """Return whether any process ever locked the folder."""
    return any((folder / name).is_file() for name in LOCK_FILES)
