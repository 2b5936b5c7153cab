"""Signals that end a training: SIGTERM and SIGUSR1 from schedulers, SIGINT from Ctrl-C, SIGALRM when time is up."""

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType, TracebackType

from isoprune_hf.errors import Cancelled, Interrupted

_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGALRM)
# A launcher passes on what a terminal or a scheduler has sent to its processes already.
_ECHO_SECONDS = 2.0


class Interruption:
    """Inside its block, a signal ends the work at once, or where it is deferred, at the end of an update.

    A second signal, more than two seconds after the first, ends the process at once. Loader processes outlive a signal
    that is sent to the whole group, since the update needs them.

    Args:
        minutes: After them the block is sent SIGALRM.
    """

    def __init__(self, minutes: float | None = None) -> None:
        self._minutes = minutes
        self.signal: signal.Signals | None = None
        self.where = "no update was under way; the same command continues"
        self._is_deferred = False
        self._received = 0.0
        self._before: dict[signal.Signals, object] = {}

    def __enter__(self) -> "Interruption":
        if threading.current_thread() is threading.main_thread():  # no other thread may listen
            self._before = {number: signal.signal(number, self._receive) for number in _SIGNALS}
            signal.setitimer(signal.ITIMER_REAL, 0 if self._minutes is None else 60 * self._minutes)
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._before:
            signal.setitimer(signal.ITIMER_REAL, 0)
        for number, handler in self._before.items():
            signal.signal(number, handler)

    @contextmanager
    def deferred(self) -> Iterator[None]:
        """Inside the block a signal is noted as `signal` and raised at its end; `where` says what was done by then."""
        self._is_deferred = True
        try:
            yield
        finally:
            self._is_deferred = False
        if self.signal is not None:
            raise _interrupted_by(self.signal, self.where)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if self.signal is not None:
            if now - self._received < _ECHO_SECONDS:
                return
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
            return
        self.signal, self._received = signal.Signals(number), now
        if not self._is_deferred:
            raise _interrupted_by(self.signal, self.where)


def _interrupted_by(number: signal.Signals, where: str) -> Interrupted:
    kind = Cancelled if number == signal.SIGINT else Interrupted
    what = "finetune.max_minutes" if number == signal.SIGALRM else number.name
    return kind(f"stopped by {what}: {where}")
