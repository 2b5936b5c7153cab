"""Which elements of an axis belong to which free leaves."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np

from isoprune_hf.pruning.graph.axis import Axis, find


@dataclass(frozen=True, eq=False)
class Cell:
    """Elements of an axis that belong to the same leaves.

    Args:
        labels: Leaf, by identity -> which of its elements each position belongs to, (n,).
        positions: Positions on the axis, (n,).
    """

    labels: Mapping[int, np.ndarray]
    positions: np.ndarray


def cells(axis: Axis, known: dict[int, list[Cell]]) -> list[Cell]:
    """Sort the elements of an axis by the leaves that they belong to; `known` keeps what was found."""
    axis = find(axis)
    if id(axis) in known:
        return known[id(axis)]
    everything = np.arange(axis.size)
    if axis.kind == "leaf":
        is_free = axis.frozen is None and axis.size > 1
        found = [Cell({id(axis): everything} if is_free else {}, everything)]
    elif axis.kind == "sum":
        found, offset = [], 0
        for part in axis.parts:
            found += [Cell(cell.labels, cell.positions + offset) for cell in cells(part, known)]
            offset += find(part).size
    else:
        found = cells(axis.parts[0], known)
        for part in axis.parts[1:]:
            found = [_combine(outer, inner, find(part).size) for outer in found for inner in cells(part, known)]
    known[id(axis)] = found
    return found


def _combine(outer: Cell, inner: Cell, size: int) -> Cell:
    labels = {leaf: np.repeat(values, len(inner.positions)) for leaf, values in outer.labels.items()}
    labels |= {leaf: np.tile(values, len(outer.positions)) for leaf, values in inner.labels.items()}
    return Cell(labels, (outer.positions[:, None] * size + inner.positions).ravel())


def rows(found: Iterable[Cell], label: Mapping[int, int], count: int) -> np.ndarray:
    """Positions of each unit: (count, k), ascending. A unit's number is the sum of the labels times their factors."""
    parts = []
    for cell in found:
        numbers = sum(cell.labels[leaf] * factor for leaf, factor in label.items())
        parts.append(cell.positions[np.argsort(numbers, kind="stable")].reshape(count, -1))
    return parts[0] if len(parts) == 1 else np.sort(np.concatenate(parts, axis=1), axis=1)
