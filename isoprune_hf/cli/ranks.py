"""Determine which rank of a launch failed first: only that rank reports its error, and all exit with its code."""

import os
import socket
from datetime import timedelta

from torch.distributed import TCPStore  # type: ignore[attr-defined]  # torch imports it from C++ without naming it

_FAILED_KEY = "isoprune/failed"
_CODE_KEY = "isoprune/code"
_SECONDS = 5  # to reach the store


def is_first_to_fail(code: int) -> bool | None:
    """Return whether no rank has failed before this one, and store the exit code for those that fail later.

    Returns:
        None if the launcher's store cannot be reached, as after the loss of the rank that held it.
    """
    if _is_alone():
        return os.environ.get("RANK", "0") == "0"
    store = _open_store()
    try:
        if store is not None:
            store.set(_CODE_KEY, str(code))
            return bool(store.add(_FAILED_KEY, 1) == 1)
    except RuntimeError:  # the rank with the store has ended
        pass
    return None


def code_of_failed_rank() -> int | None:
    """Return the exit code of a rank that has failed and reported; None if there is none."""
    store = _open_store()
    if store is None or not store.check([_CODE_KEY]):
        return None
    return int(store.get(_CODE_KEY))


def _open_store() -> TCPStore | None:
    """Open the launcher's store; None for a single process, or if the store cannot be reached."""
    if _is_alone():
        return None
    try:
        address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        # Without this TCPStore would write pages of its own to standard error if nobody listens.
        socket.create_connection((address, port), timeout=_SECONDS).close()
        return TCPStore(address, port, is_master=False, timeout=timedelta(seconds=_SECONDS))
    except (KeyError, ValueError, OSError, RuntimeError):
        return None


def _is_alone() -> bool:
    return int(os.environ.get("WORLD_SIZE", "1")) == 1
