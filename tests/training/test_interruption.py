"""Signals and the time limit, within one process."""

import signal

import pytest

from isoprune_hf.errors import Cancelled, Interrupted
from isoprune_hf.training import interruption as interruption_module
from isoprune_hf.training.interruption import Interruption


@pytest.mark.parametrize(
    ("number", "kind"), [(signal.SIGTERM, Interrupted), (signal.SIGUSR1, Interrupted), (signal.SIGINT, Cancelled)]
)
def test_signal_raises_at_once_outside_a_deferred_part(number: signal.Signals, kind: type[Interrupted]) -> None:
    before = signal.getsignal(number)
    with pytest.raises(kind, match=f"stopped by {number.name}") as caught, Interruption():
        signal.raise_signal(number)
    assert type(caught.value) is kind and signal.getsignal(number) == before


def test_signal_passes_handlers_of_other_errors() -> None:
    handled = []
    with pytest.raises(Interrupted, match="stopped by SIGTERM"), Interruption():
        try:
            signal.raise_signal(signal.SIGTERM)
        except Exception as error:  # noqa: BLE001 - such as a log that must not end a training
            handled.append(error)
    assert handled == []


def test_deferred_signal_raises_at_the_end() -> None:
    finished = False
    stopped = pytest.raises(Interrupted, match="stopped by SIGTERM: half is saved")
    with stopped, Interruption() as interruption, interruption.deferred():
        signal.raise_signal(signal.SIGTERM)
        assert interruption.received() == signal.SIGTERM
        interruption.position = "half is saved"
        finished = True
    assert finished


def test_repeated_signal_within_two_seconds_is_ignored() -> None:
    with pytest.raises(Interrupted), Interruption() as interruption, interruption.deferred():
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGTERM)


@pytest.mark.parametrize("has_timer", [True, False])
def test_time_limit_stops_with_or_without_timer(has_timer: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(interruption_module, "_HAS_TIMER", has_timer)
    stopped = pytest.raises(Interrupted, match=r"stopped by finetune\.max_minutes")
    with stopped, Interruption(minutes=1e-5) as interruption, interruption.deferred():
        while interruption.received() is None:
            pass


def test_no_time_limit_receives_nothing() -> None:
    with Interruption() as interruption, interruption.deferred():
        assert interruption.received() is None
