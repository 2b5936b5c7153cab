"""Calls in turns, by a clock of the test: their times, and when the machine counts as busy."""

import itertools
from collections.abc import Iterable

import pytest

from isoprune_hf.measuring.timing import Clock, Passes, Rounds, Timing, drift_of, find_load, time_calls


class Hands:
    """A clock that calls move on by given seconds; the CPU gets a share of them."""

    def __init__(self, share: float = 1.0) -> None:
        self.now, self.worked, self.share = 0.0, 0.0, share
        self.clock = Clock(lambda: self.now, lambda: self.worked)

    def advance(self, seconds: float) -> None:
        self.now += seconds
        self.worked += seconds * self.share


def times_of(seconds: Iterable[float], rounds: Rounds, share: float = 1.0):
    """Time one model whose calls take the given seconds."""
    hands, taken = Hands(share), iter(seconds)
    return time_calls({"a": lambda: hands.advance(next(taken))}, rounds, clock=hands.clock)


def test_calls_are_made_in_turns_after_warmup() -> None:
    order: list[str] = []
    hands, spent = Hands(), iter([9.0, 9.0, 0.001, 0.002, 0.003, 0.004])

    def call(name: str) -> None:
        order.append(name)
        hands.advance(next(spent))

    calls = {name: lambda name=name: call(name) for name in "ab"}
    timing = time_calls(calls, Rounds(repeats=2, warmup=1), clock=hands.clock)
    assert order == ["a", "b"] * 3
    assert timing.passes["a"].wall == pytest.approx((1.0, 3.0))
    assert timing.passes["b"].wall == pytest.approx((2.0, 4.0))
    assert timing.medians() == pytest.approx({"a": 2.0, "b": 3.0})


def test_cpu_time_is_beside_wall_time() -> None:
    assert times_of(itertools.repeat(0.5), Rounds(2, 0), share=1.5).passes["a"].cpu == pytest.approx((750.0, 750.0))


@pytest.mark.parametrize(
    ("rounds", "count"), [(Rounds(20, 1, seconds=2.5), 5), (Rounds(20, 1, seconds=7.5), 8), (Rounds(3, 0, 0.5), 3)]
)
def test_time_limit_applies_after_five_rounds(rounds: Rounds, count: int) -> None:
    assert len(times_of(itertools.repeat(1.0), rounds).passes["a"].wall) == count


def test_drift_compares_medians_of_thirds() -> None:
    # Medians 1, 1.2 and 1.5; a single slow pass in a third does not count.
    assert drift_of([1, 1, 9, 1.2, 1.2, 1.2, 1.5, 1.5, 0.1]) == pytest.approx(0.5)
    assert drift_of([1.0, 2.0]) == 0.0


@pytest.mark.parametrize(
    ("wall", "share", "words"),
    [
        ([1.0] * 6, 1.0, None),
        ([1.0] * 4 + [1.09] * 2, 1.0, None),
        ([1.0] * 4 + [1.2] * 2, 1.0, "drifted by 20%"),
        ([1.0] * 6, 0.89, "had a core for 89%"),
        ([1.0] * 6, 2.0, None),  # two threads
        ([1.0, 9.0, 1.0, 9.0], 0.1, None),  # too few to judge
    ],
)
def test_load_is_found_by_the_rule(wall: list[float], share: float, words: str | None) -> None:
    passes = {"quiet": Passes((1.0,) * 6, (1.0,) * 6), "a": Passes(tuple(wall), tuple(share * time for time in wall))}
    found = find_load(passes)
    assert (found is None) == (words is None)
    assert words is None or (found is not None and words in found)
    assert find_load(passes, on_cpu=False) is None or words == "drifted by 20%"


def test_undisturbed_times_follow_cpu_time_if_busy() -> None:
    # Two threads: 1 ms of wall time for 2 ms of CPU time at best; the base waits for a core in most passes.
    passes = {"base": Passes((9.0, 9.0, 5.0), (8.0, 8.0, 8.0)), "pruned": Passes((1.0, 3.0, 1.0), (2.0, 2.0, 2.0))}
    assert Timing(passes, "load").undisturbed() == {"base": 4.0, "pruned": 1.0}
    assert Timing(passes, None).undisturbed() == {"base": 9.0, "pruned": 1.0}
    still = {"a": Passes((2.0,), (0.0,))}
    assert Timing(still, "load").undisturbed() == {"a": 2.0}


def test_busy_measurement_is_repeated_until_quiet() -> None:
    busy = [1.0] * 4 + [2.0] * 2
    timing = times_of([*busy, *[3.0] * 6, *[9.0] * 6], Rounds(6, 0))
    assert timing.busy is None and timing.passes["a"].wall == (3000.0,) * 6


def test_busiest_attempts_are_dropped_at_the_bound() -> None:
    attempts = [[1.0] * 4 + [end] * 2 for end in (3.0, 1.5, 2.0, 1.0)]
    timing = times_of(itertools.chain.from_iterable(attempts), Rounds(6, 0, attempts=3))
    assert timing.passes["a"].wall[-1] == 1500.0
    assert timing.busy == "the time of a drifted by 50% between repeats"
