"""The index maps of torch-pruning's dependency graph, applied to arrays: `apply_mapping`.

An index map converts the positions of channels before a concatenation, split, slice or flattening to those after it.
torch-pruning applies it to one Python object per channel. The private names of torch_pruning that this needs, as read
in torch_pruning 1.6.1, are in this module only.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import numpy as np
from torch_pruning.dependency import index_mapping

from isoprune_hf.errors import UnsupportedArchitectureError


@dataclass(frozen=True, eq=False)
class Positions:
    """The channels of a group in one tensor.

    Args:
        idx: Position of each channel in the tensor, (n,).
        root: Channel of the group that each position belongs to, (n,).
        low: Smallest position.
        high: Largest position + 1; equal to `low` if there are none.
    """

    idx: np.ndarray
    root: np.ndarray
    low: int
    high: int

    @classmethod
    def of(cls, idx: np.ndarray, root: np.ndarray) -> "Positions":
        """Build from positions and channels."""
        return cls(idx, root, int(idx.min()), int(idx.max()) + 1) if len(idx) else cls(idx, root, 0, 0)

    def shifted(self, offset: int) -> "Positions":
        """Return the positions plus an offset."""
        return Positions(self.idx + offset, self.root, self.low + offset, self.high + offset) if offset else self

    def within(self, low: int, high: int) -> "Positions":
        """Return the positions in [low, high), counted from `low`."""
        if self.low >= high or self.high <= low:
            return _EMPTY
        if self.low >= low and self.high <= high:
            return self.shifted(-low)
        inside = (self.idx >= low) & (self.idx < high)
        return Positions.of(self.idx[inside] - low, self.root[inside])


_EMPTY = Positions.of(np.arange(0), np.arange(0))


def _concat(mapping: Any, at: Positions) -> Positions:
    low, high = mapping.offset
    return at.within(low, high) if mapping.reverse else at.shifted(low)


def _split(mapping: Any, at: Positions) -> Positions:
    low, high = mapping.offset
    return at.shifted(low) if mapping.reverse else at.within(low, high)


def _slice(mapping: Any, at: Positions) -> Positions:
    if mapping.reverse:
        return Positions.of(at.idx * mapping.step + mapping.start, at.root)
    at = at.within(mapping.start, mapping.end)
    hit = at.idx % mapping.step == 0
    return Positions.of(at.idx[hit] // mapping.step, at.root[hit])


def _flatten(mapping: Any, at: Positions) -> Positions:
    stride = mapping._stride
    if mapping.reverse:
        pairs = np.unique(np.stack([at.idx // stride, at.root]), axis=1)
        return Positions.of(pairs[0], pairs[1])
    return Positions.of((at.idx[:, None] * stride + np.arange(stride)).ravel(), np.repeat(at.root, stride))


_MAPPINGS: Mapping[type, Callable[[Any, Positions], Positions]] = MappingProxyType(
    {
        index_mapping._ConcatIndexMapping: _concat,
        index_mapping._SplitIndexMapping: _split,
        index_mapping._SliceIndexMapping: _slice,
        index_mapping._FlattenIndexMapping: _flatten,
    }
)


def apply_mapping(mapping: object, at: Positions) -> Positions:
    """Apply one of torch-pruning's index maps to positions.

    Raises:
        UnsupportedArchitectureError: The map is of an unknown kind; the message names it.
    """
    apply = _MAPPINGS.get(type(mapping))
    if apply is None:
        raise UnsupportedArchitectureError(
            f"the channels pass an operation that torch-pruning's engine does not support "
            f"({type(mapping).__name__.strip('_')})"
        )
    return apply(mapping, at)
