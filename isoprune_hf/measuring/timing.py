"""Time calls in turns, and detect a machine that is busy with other work: `time_calls`."""

import itertools
import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

_MIN_ROUNDS = 5  # timed rounds before a time limit ends a measurement, and before drift is judged
_PARTS = 3
MAX_DRIFT = 0.1  # between the medians of the parts
MIN_CPU_SHARE = 0.9  # of the wall time


@dataclass(frozen=True)
class Rounds:
    """Numbers of calls in a measurement. In a round, every model is called once.

    Args:
        repeats: Timed rounds.
        warmup: Untimed rounds before them.
        seconds: No new round starts after the timed rounds took this long, but at least five are run.
        attempts: A measurement on a busy machine is repeated until there are this many.
    """

    repeats: int
    warmup: int
    seconds: float = math.inf
    attempts: int = 3

    def with_warmup(self, minimum: int) -> "Rounds":
        """Return rounds with at least so many untimed ones."""
        return replace(self, warmup=max(self.warmup, minimum))


class Clock(NamedTuple):
    """Functions that return the seconds of wall time, and of CPU time of all threads of this process."""

    wall: Callable[[], float] = time.perf_counter
    cpu: Callable[[], float] = time.process_time


class Passes(NamedTuple):
    """Milliseconds of each timed call of a model: wall time, and CPU time of all threads."""

    wall: tuple[float, ...]
    cpu: tuple[float, ...]


class Timing(NamedTuple):
    """Times of some models that were called in turns.

    Attributes:
        passes: Times by name.
        busy: Why the machine counts as busy; None if it does not.
    """

    passes: Mapping[str, Passes]
    busy: str | None

    def medians(self) -> dict[str, float]:
        """Return the median wall time of a call, in milliseconds, by name."""
        return {name: statistics.median(passes.wall) for name, passes in self.passes.items()}

    def undisturbed(self) -> dict[str, float]:
        """Return the medians; on a busy machine an estimate of them from the CPU time, by name.

        Waiting for a core lengthens the wall time of long passes more often than that of short ones, which makes a
        small model look faster than it is. The median CPU time is then multiplied by the smallest wall time for a
        second of CPU time that any pass needed.
        """
        if self.busy is None:
            return self.medians()
        pairs = [pair for passes in self.passes.values() for pair in zip(passes.wall, passes.cpu, strict=True)]
        scale = min((wall / cpu for wall, cpu in pairs if cpu > 0), default=0.0)
        if scale == 0.0:
            return self.medians()
        return {name: scale * statistics.median(passes.cpu) for name, passes in self.passes.items()}


def time_calls(
    calls: Mapping[str, Callable[[], object]], rounds: Rounds, *, on_cpu: bool = True, clock: Clock | None = None
) -> Timing:
    """Make some calls in turns and time each of them; repeat the measurement while the machine is busy.

    Args:
        calls: Name -> a call, which returns when its work is done.
        rounds: How often each of them is made, and how many measurements there are at most.
        on_cpu: The work is done by this process, so that its CPU time counts.
        clock: Replaces the clocks of the system.

    Returns:
        The first measurement on a machine that is not busy, or that with the smallest drift; see `find_load`.
    """
    clock = clock or Clock()
    measured: list[tuple[float, Timing]] = []
    for _ in range(max(rounds.attempts, 1)):
        passes = _measure(calls, rounds, clock)
        busy = find_load(passes, on_cpu=on_cpu)
        drift = max(map(drift_of, (times.wall for times in passes.values())), default=0.0)
        measured.append((drift, Timing(passes, busy)))
        if busy is None:
            return measured[-1][1]
    return min(measured, key=lambda pair: pair[0])[1]


def find_load(passes: Mapping[str, Passes], *, on_cpu: bool = True) -> str | None:
    """Return why the machine counts as busy with other work, or None.

    The rule, for each model that was called at least five times: it is busy if the median wall time of the first,
    second and last third of its calls differ by more than 10 % of the smallest, or if, on a CPU, the CPU time of all
    its calls is less than 90 % of their wall time, so that they waited for a core.

    Args:
        passes: Times of each model.
        on_cpu: The work was done by this process.
    """
    for name, times in passes.items():
        if len(times.wall) < _MIN_ROUNDS:
            continue
        drift = drift_of(times.wall)
        if drift > MAX_DRIFT:
            return f"the time of {name} drifted by {drift:.0%} between repeats"
        share = sum(times.cpu) / sum(times.wall)
        if on_cpu and share < MIN_CPU_SHARE:
            return f"{name} had a core for {share:.0%} of its time"
    return None


def drift_of(times: Sequence[float]) -> float:
    """Return by which fraction the largest median of the thirds of some times exceeds the smallest."""
    if len(times) < _PARTS:
        return 0.0
    edges = [len(times) * part // _PARTS for part in range(_PARTS + 1)]
    medians = [statistics.median(times[start:end]) for start, end in itertools.pairwise(edges)]
    return max(medians) / min(medians) - 1


def _measure(calls: Mapping[str, Callable[[], object]], rounds: Rounds, clock: Clock) -> dict[str, Passes]:
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in calls}
    spent = 0.0
    for number in range(rounds.warmup + rounds.repeats):
        if number >= rounds.warmup + _MIN_ROUNDS and spent > rounds.seconds:
            break
        for name, call in calls.items():
            wall, cpu = clock.wall(), clock.cpu()
            call()
            taken = clock.wall() - wall, clock.cpu() - cpu
            if number >= rounds.warmup:
                times[name].append((1000 * taken[0], 1000 * taken[1]))
                spent += taken[0]
    return {name: Passes(tuple(w for w, _ in pairs), tuple(c for _, c in pairs)) for name, pairs in times.items()}
