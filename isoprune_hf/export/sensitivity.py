"""Choose the layers that stay in floating point: `choose_left_out`, with the measured effect as a `Harm`."""

from collections.abc import Callable, Iterable, Sequence
from typing import Literal, NamedTuple

import numpy as np

Nodes = frozenset[str]


class Unit(NamedTuple):
    """Nodes of a graph that are quantised, or left out, together.

    Args:
        name: Name for a reader.
        nodes: Names of the nodes.
    """

    name: str
    nodes: Nodes


class Choice(NamedTuple):
    """Units that stay in floating point, and the effect of quantising all others.

    Args:
        left_out: The units, the most sensitive first.
        divergence: Effect of quantising the rest.
    """

    left_out: tuple[Unit, ...]
    divergence: float

    @property
    def nodes(self) -> Nodes:
        """Names of all nodes that are left out."""
        return union(self.left_out)


def choose_left_out(units: Sequence[Unit], effect: Callable[[Nodes], float], bound: float) -> Choice:
    """Leave out as few units as needed for an effect of at most `bound`.

    Nothing is left out if the effect of quantising everything is small enough. Otherwise the units are ordered by the
    effect without each one alone, and the shortest beginning of that order that satisfies the bound is found by
    bisection, for which the effect must not grow with the number of units left out.

    Args:
        units: Units that may be left out.
        effect: Measures the effect of quantising all nodes but the given ones.
        bound: Largest effect allowed; without any quantised unit it is satisfied.
    """
    divergence = effect(frozenset())
    if divergence <= bound:
        return Choice((), divergence)
    alone = {unit.name: effect(unit.nodes) for unit in units}
    order = sorted(units, key=lambda unit: alone[unit.name])
    below, above = 0, len(order)  # the bound is violated with `below` units left out, satisfied with `above`
    found = Choice(tuple(order), 0.0)
    while above - below > 1:
        # Few units suffice as a rule, so that the first half is searched from its beginning.
        count = below + 1 if below < 4 else (below + above) // 2
        divergence = effect(union(order[:count]))
        if divergence <= bound:
            above, found = count, Choice(tuple(order[:count]), divergence)
        else:
            below = count
    return found


def union(units: Iterable[Unit]) -> Nodes:
    """Return the names of the nodes of several units."""
    return frozenset(node for unit in units for node in unit.nodes)


def mean_divergence(reference: np.ndarray, found: np.ndarray) -> float:
    """Compute the Kullback-Leibler divergence of predicted classes from those of a reference, in nats.

    Args:
        reference: Logits (B, classes).
        found: Logits (B, classes) to compare.

    Returns:
        Mean over the images; infinite if a logit is not finite.
    """
    if not np.isfinite(found).all():
        return float("inf")
    expected, answer = _log_softmax(reference), _log_softmax(found)
    return float((np.exp(expected) * (expected - answer)).sum(axis=1).mean())


def mean_distance(reference: np.ndarray, found: np.ndarray) -> float:
    """Compute the squared distance of outputs from those of a reference, relative to the squared norm of these.

    Args:
        reference: Outputs (B, ...).
        found: Outputs (B, ...) to compare.

    Returns:
        Mean over the images; infinite if an entry is not finite.
    """
    if not np.isfinite(found).all():
        return float("inf")
    wanted = reference.reshape(len(reference), -1).astype(np.float64)
    squares = ((found.reshape(len(found), -1) - wanted) ** 2).sum(axis=1)
    return float((squares / (wanted**2).sum(axis=1)).mean())


def _log_softmax(logits: np.ndarray) -> np.ndarray:
    shifted = logits.astype(np.float64) - logits.max(axis=1, keepdims=True)
    logarithms: np.ndarray = shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))
    return logarithms


class Harm(NamedTuple):
    """Measures what eight bits change, against the outputs in fp32.

    Args:
        key: Its name in the record of a quantised model.
        text: The sentence about a value `{}` of it.
        measure: Returns it for the outputs in fp32 and those to compare.
    """

    key: Literal["divergence", "distance"]
    text: str
    measure: Callable[[np.ndarray, np.ndarray], float]


DIVERGENCE = Harm("divergence", "predictions differ from fp32 by {} nats", mean_divergence)
DISTANCE = Harm("distance", "outputs differ from fp32 by {} of their squared norm", mean_distance)
