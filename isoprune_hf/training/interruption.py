"""Signals that end a training: SIGTERM and SIGUSR1 of schedulers, SIGINT of Ctrl-C, and the end of the time limit."""

import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType, TracebackType
from typing import Any

from isoprune_hf.errors import Cancelled, Interrupted

_Handler = Callable[[int, FrameType | None], Any] | int | signal.Handlers | None

# Those that the platform has: Windows has neither SIGUSR1 nor SIGALRM.
_SIGNALS: tuple[signal.Signals, ...] = tuple(
    getattr(signal, name) for name in ("SIGTERM", "SIGUSR1", "SIGINT", "SIGALRM") if hasattr(signal, name)
)
_HAS_TIMER = hasattr(signal, "setitimer")
# A launcher forwards signals that a terminal or a scheduler has already sent to all of its processes.
_ECHO_SECONDS = 2.0


class _Received(BaseException):
    """Raised by a signal handler, anywhere in the block: no `except Exception` may take it for its own error."""


class Interruption:
    """Handles signals inside its block: a signal ends it with Interrupted, at once or after a deferred part.

    A second signal, more than two seconds after the first, ends the process immediately. Loader processes ignore
    signals that are sent to the whole process group, since the current update still needs them.

    Args:
        minutes: Time limit of the block, which has the effect of a signal. On platforms without a timer, `received`
            checks it.
    """

    def __init__(self, minutes: float | None = None) -> None:
        self._seconds = None if minutes is None else 60 * minutes
        self.signal: signal.Signals | None = None
        self.position = "no update was running; rerun the same command to resume"
        self._is_deferred = False
        self._is_time_up = False
        self._deadline: float | None = None
        self._received_at = 0.0
        self._old_handlers: dict[signal.Signals, _Handler] = {}

    def __enter__(self) -> "Interruption":
        if threading.current_thread() is threading.main_thread():  # other threads cannot set handlers
            self._old_handlers = {number: signal.signal(number, self._receive) for number in _SIGNALS}
            if _HAS_TIMER:
                signal.setitimer(signal.ITIMER_REAL, self._seconds or 0)
            elif self._seconds is not None:
                self._deadline = time.monotonic() + self._seconds
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._old_handlers and _HAS_TIMER:
            signal.setitimer(signal.ITIMER_REAL, 0)
        for number, handler in self._old_handlers.items():
            signal.signal(number, handler)
        if isinstance(error, _Received) and self.signal is not None:
            raise self._error(self.signal) from None

    @contextmanager
    def deferred(self) -> Iterator[None]:
        """Defer signals inside the block, and raise Interrupted at its end; set `position` before that."""
        self._is_deferred = True
        try:
            yield
        finally:
            self._is_deferred = False
        if self.signal is not None:
            raise self._error(self.signal)

    def received(self) -> signal.Signals | None:
        """Return the signal that this process has received, if any."""
        if self.signal is None and self._deadline is not None and time.monotonic() >= self._deadline:
            self._is_time_up = True
            self.signal = signal.SIGTERM
        return self.signal

    def _receive(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if self.signal is not None:
            if now - self._received_at < _ECHO_SECONDS:
                return
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)
            return
        self.signal = signal.Signals(number)
        self._is_time_up = self.signal.name == "SIGALRM"
        self._received_at = now
        if not self._is_deferred:
            raise _Received

    def _error(self, number: signal.Signals) -> Interrupted:
        kind = Cancelled if number == signal.SIGINT else Interrupted
        reason = "finetune.max_minutes" if self._is_time_up else number.name
        return kind(f"stopped by {reason}: {self.position}")
