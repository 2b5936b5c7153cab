"""The fewest units stay in floating point, the most sensitive first; the effect is a divergence in nats."""

import math

import numpy as np
import pytest

from isoprune_hf.export.sensitivity import Nodes, Unit, choose_left_out, mean_divergence

COSTS = {"a": 1.0, "b": 8.0, "c": 2.0, "d": 4.0, "e": 0.5, "f": 16.0, "g": 0.25}
UNITS = [Unit(f"unit {node}", frozenset(node)) for node in COSTS]


def additive(left_out: Nodes) -> float:
    """Return the sum of the costs of all nodes that are quantised."""
    return sum(cost for node, cost in COSTS.items() if node not in left_out)


@pytest.mark.parametrize(
    ("bound", "kept"),
    [
        (31.75, ""),
        (31.0, "f"),
        (15.75, "f"),
        (15.5, "fb"),
        (7.75, "fb"),
        (3.75, "fbd"),
        (0.5, "fbdcae"),
        (0, "fbdcaeg"),
    ],
)
def test_fewest_units_are_left_out_for_bound(bound: float, kept: str) -> None:
    choice = choose_left_out(UNITS, additive, bound)
    assert [unit.name for unit in choice.left_out] == [f"unit {node}" for node in kept]
    assert choice.divergence == additive(choice.nodes) <= bound


def test_nothing_is_measured_alone_if_all_fits() -> None:
    asked = []

    def effect(left_out: Nodes) -> float:
        asked.append(left_out)
        return 0.01

    assert choose_left_out(UNITS, effect, 0.02).left_out == ()
    assert asked == [frozenset()]


def test_divergence_is_that_of_probabilities() -> None:
    reference = np.log(np.array([[0.5, 0.5], [0.25, 0.75]], np.float32))
    found = np.log(np.array([[0.25, 0.75], [0.25, 0.75]], np.float32)) + 3  # a constant changes no probability
    by_hand = (0.5 * math.log(0.5 / 0.25) + 0.5 * math.log(0.5 / 0.75)) / 2
    assert mean_divergence(reference, found) == pytest.approx(by_hand, abs=1e-6)
    assert mean_divergence(reference, reference) == 0
    assert mean_divergence(reference, np.full_like(found, np.nan)) == math.inf
