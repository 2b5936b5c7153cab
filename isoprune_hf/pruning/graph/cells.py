"""The elements of an axis, sorted by the free leaves that they belong to: `find_cells` and `unit_positions`."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np

from isoprune_hf.pruning.graph.axis import Axis, find


@dataclass(frozen=True, eq=False)
class Cell:
    """Elements of an axis that belong to the same leaves.

    Args:
        labels: Leaf, by identity -> the index of the leaf's element that each position belongs to, (n,).
        positions: Positions on the axis, (n,).
    """

    labels: Mapping[int, np.ndarray]
    positions: np.ndarray


def find_cells(axis: Axis, known: dict[int, list[Cell]]) -> list[Cell]:
    """Sort the elements of an axis by the leaves that they belong to.

    Args:
        axis: The axis.
        known: Cells of axes, by identity; results are added, so that parts shared by many axes are computed once.
    """
    axis = find(axis)
    if id(axis) in known:
        return known[id(axis)]
    if axis.kind == "leaf":
        is_free = axis.frozen is None and axis.size > 1
        everything = np.arange(axis.size)
        found = [Cell({id(axis): everything} if is_free else {}, everything)]
    elif axis.kind == "sum":
        found = []
        offset = 0
        for part in axis.parts:
            found += [Cell(cell.labels, cell.positions + offset) for cell in find_cells(part, known)]
            offset += find(part).size
    else:
        found = find_cells(axis.parts[0], known)
        for part in axis.parts[1:]:
            size = find(part).size
            found = [_combine(outer, inner, size) for outer in found for inner in find_cells(part, known)]
    known[id(axis)] = found
    return found


def _combine(outer: Cell, inner: Cell, size: int) -> Cell:
    """Combine cells of an outer and an inner factor; the inner factor has `size` elements."""
    labels = {leaf: np.repeat(values, len(inner.positions)) for leaf, values in outer.labels.items()}
    labels |= {leaf: np.tile(values, len(outer.positions)) for leaf, values in inner.labels.items()}
    return Cell(labels, (outer.positions[:, None] * size + inner.positions).ravel())


def unit_positions(found: Iterable[Cell], strides: Mapping[int, int], count: int) -> np.ndarray:
    """Return the positions of each unit of a group on an axis, ascending in each row.

    Args:
        found: Cells that contain the leaves of the group.
        strides: Leaf, by identity -> its stride; the number of a unit is the sum of its labels times their strides.
        count: Number of units.

    Returns:
        Positions, (count, k).
    """
    parts = []
    for cell in found:
        numbers = np.zeros(len(cell.positions), dtype=np.int64)
        for leaf, stride in strides.items():
            numbers += cell.labels[leaf] * stride
        parts.append(cell.positions[np.argsort(numbers, kind="stable")].reshape(count, -1))
    return parts[0] if len(parts) == 1 else np.sort(np.concatenate(parts, axis=1), axis=1)
