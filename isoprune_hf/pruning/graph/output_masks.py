"""Which elements of the outputs of layers a cut keeps, by their traced axes: `output_masks`."""

from collections.abc import Mapping, Sequence

import numpy as np

from isoprune_hf.pruning.graph.axis import Axis, find
from isoprune_hf.pruning.graph.axis_graph import AxisGraph
from isoprune_hf.pruning.graph.cells import Cell, find_cells

_Masks = Mapping[tuple[str, int], np.ndarray]
OutputMasks = Mapping[str, Sequence[Mapping[int, np.ndarray]]]


def output_masks(graph: AxisGraph, masks: _Masks) -> OutputMasks:
    """Return layer -> for each of its calls, dim of its output -> which elements of the dim are kept.

    Dims that are kept whole are missing.

    Args:
        graph: The graph of the network before the cut.
        masks: (tensor, dim) -> which of its elements are kept; missing dims are kept whole.
    """
    cells: dict[int, list[Cell]] = {}
    known: dict[int, np.ndarray | None] = {}

    def mask_of(axis: Axis) -> np.ndarray | None:
        axis = find(axis)
        if id(axis) not in known:
            known[id(axis)] = _axis_mask(graph, masks, axis, find_cells(axis, cells))
        return known[id(axis)]

    return {
        layer: [
            {dim: mask for dim, axis in enumerate(axes) if (mask := mask_of(axis)) is not None} for axes in outputs
        ]
        for layer, outputs in graph.trace.outputs.items()
    }


def _axis_mask(graph: AxisGraph, masks: _Masks, axis: Axis, cells: Sequence[Cell]) -> np.ndarray | None:
    """Return which elements of an axis are kept; None if all are."""
    mask = np.ones(axis.size, dtype=bool)
    for cell in cells:
        for source, kept in _sources(graph, masks, cell):
            # The number of an element counts through the elements of all leaves that both cells have.
            leaves = sorted(cell.labels.keys() & source.labels.keys())
            sizes = [int(max(cell.labels[leaf].max(), source.labels[leaf].max())) + 1 for leaf in leaves]
            numbers, allowed = (
                np.ravel_multi_index([each.labels[leaf] for leaf in leaves], sizes) for each in (cell, source)
            )
            mask[cell.positions] &= np.isin(numbers, allowed[kept[source.positions]])
    return None if mask.all() else mask


def _sources(graph: AxisGraph, masks: _Masks, cell: Cell) -> list[tuple[Cell, np.ndarray]]:
    """Return cells of tensors that decide which elements of a cell are kept, with the masks of their dims.

    The best is one tensor with the same leaves; for each leaf that it lacks, another tensor is added.
    """
    found: list[tuple[Cell, np.ndarray]] = []
    missing = set(cell.labels)
    while missing:
        candidates = [
            (len(missing & each.labels.keys()), -len(each.labels.keys() - cell.labels.keys()), each, masks[place])
            for leaf in missing
            for place, cells in graph.members.get(leaf, {}).items()
            if place in masks
            for each in cells
        ]
        if not candidates:
            break
        _, _, best, mask = max(candidates, key=lambda candidate: candidate[:2])
        found.append((best, mask))
        missing -= best.labels.keys()
    return found
