"""Run the command line or a function in forked processes, which start at once because all modules are imported."""

import contextlib
import os
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState, PartialState

from isoprune_hf.__main__ import main

# torch refuses gradients in a process forked after a runtime has registered a device and a first pass has seen it.
torch.ones(1, requires_grad=True).backward()


class Ended(NamedTuple):
    """The exit code of a process (negative for a signal) and its output."""

    code: int
    out: str
    err: str


class Process:
    """A command in a forked process, as one of the ranks."""

    def __init__(
        self,
        arguments: Sequence[str | Path],
        log: Path,
        before: Callable[[], object] | None = None,
        *,
        rank: int = 0,
        world: int = 1,
        port: str = "",
    ):
        self._log = log
        log.mkdir(parents=True, exist_ok=True)
        self._code: int | None = None
        self.pid = os.fork()
        if self.pid == 0:
            _become(log, rank, world, port)
            if before is not None:
                before()
            _run([str(argument) for argument in arguments])

    def send(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def poll(self) -> int | None:
        if self._code is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            self._code = os.waitstatus_to_exitcode(status) if pid else None
        return self._code

    def wait(self, seconds: float = 120) -> Ended:
        self.wait_for(lambda: self.poll() is not None, seconds)
        return Ended(self._code, (self._log / "out").read_text(), (self._log / "err").read_text())

    def wait_for(self, holds: Callable[[], bool], seconds: float = 120) -> bool:
        """Wait until `holds` returns true; return False if the process ended before."""
        deadline = time.monotonic() + seconds
        while not holds():
            if time.monotonic() > deadline:
                self.send(signal.SIGKILL)
                raise TimeoutError(f"after {seconds} s: {(self._log / 'err').read_text()}")
            if self.poll() is not None:
                return holds()
            _pause()
        return True


def run(arguments: Sequence[str | Path], log: Path, before: Callable[[], object] | None = None) -> Ended:
    """Run a command to its end; `before` is called in its process first."""
    return Process(arguments, log, before).wait()


def start_ranks(
    arguments: Sequence[str | Path], log: Path, world: int = 2, before: Callable[[], object] | None = None
) -> list[Process]:
    """Start the ranks of a command; a single rank runs as without a launcher."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = str(listener.getsockname()[1])
    return [Process(arguments, log / str(rank), before, rank=rank, world=world, port=port) for rank in range(world)]


def call_on_ranks(work: Callable[[Accelerator], object], log: Path, world: int = 2) -> None:
    """Call a function on every one of `world` ranks; it writes its results to files.

    Raises:
        AssertionError: A rank has failed; the message is its output.
    """

    def call() -> None:
        code = 1
        try:
            accelerator = Accelerator(cpu=True)
            assert accelerator.num_processes == world
            work(accelerator)
            code = 0
        finally:
            if code:
                traceback.print_exc()
            sys.stderr.flush()
            os._exit(code)

    ended = [rank.wait() for rank in start_ranks([], log, world, call)]
    assert [end.code for end in ended] == [0] * world, "\n".join(end.err for end in ended)


def write_slowly(module: ModuleType, seconds: float) -> None:
    """Sleep after each state that a module writes, so that a kill can follow."""
    write = module.write_snapshot

    def slow(*arguments: object, **named: object) -> None:
        write(*arguments, **named)
        time.sleep(seconds)

    module.write_snapshot = slow


def _pause() -> None:
    with contextlib.suppress(OSError):
        os.sched_yield()
    signal.sigtimedwait([signal.SIGCHLD], 0.002)


def _become(log: Path, rank: int, world: int, port: str) -> None:
    for name, descriptor in (("out", 1), ("err", 2)):
        os.dup2(os.open(log / name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), descriptor)
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
        signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_SETMASK, [])
    for state in (AcceleratorState, PartialState, GradientState):
        state._shared_state.clear()
    torch.set_num_threads(1)
    os.environ["ACCELERATE_USE_CPU"] = "true"
    if world > 1:
        place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world}
        os.environ.update({name: str(value) for name, value in place.items()})
        os.environ.update({"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port})


def _run(arguments: list[str]) -> None:
    sys.stdout, sys.stderr = os.fdopen(1, "w", buffering=1), os.fdopen(2, "w", buffering=1)
    code = 1
    try:
        code = main(arguments)
    except SystemExit as stopped:
        code = stopped.code
    finally:
        if sys.exc_info()[0] is not None:  # it never rises past os._exit: the parent reads it
            traceback.print_exc()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
