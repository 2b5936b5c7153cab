"""The composition of tensor dimensions: `Axis`, its factors and pieces, and frozen leaves.

An axis is a leaf, a product of factors (a view merged several dims, the outermost first), or a sum of pieces (several
dims were concatenated). A leaf is free, or frozen with a reason: no element of a frozen leaf can be removed.
`unify.py` makes two axes the same axis.
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Literal


class Axis:
    """A dimension of a tensor, or a part of one.

    Axes that turn out to be the same axis are linked by `ref` (a union-find structure); `find` follows the links.

    Args:
        size: Number of elements.
        parts: Factors of a product or pieces of a sum.
        kind: How the parts are composed.
        frozen: Why no element can be removed, or None; only meaningful for leaves.
        is_copy: The axis repeats a single element (expand, repeat), so its elements are not channels.
    """

    __slots__ = ("frozen", "is_batch", "is_copy", "kind", "parts", "ref", "size")

    def __init__(
        self,
        size: int,
        parts: tuple["Axis", ...] = (),
        kind: Literal["leaf", "product", "sum"] = "leaf",
        *,
        frozen: str | None = None,
        is_copy: bool = False,
    ):
        self.size = int(size)
        self.parts = parts
        self.kind = kind
        self.frozen = frozen
        self.is_copy = is_copy
        self.is_batch = False  # a batch dim of a product of two activations, such as the heads of an attention
        self.ref: Axis | None = None

    def __repr__(self) -> str:
        axis = find(self)
        if axis.kind == "leaf":
            return f"{axis.size}{'!' if axis.frozen else ''}"
        return "(" + (" x " if axis.kind == "product" else " + ").join(map(repr, axis.parts)) + ")"


def find(axis: Axis) -> Axis:
    """Return the axis that represents `axis` after all unifications; shortens the chain of links on the way."""
    while (other := axis.ref) is not None:
        if other.ref is not None:
            axis.ref = other.ref
        axis = other
    return axis


def frozen_axis(size: int, reason: str) -> Axis:
    """Build a leaf that no element can be removed from."""
    return Axis(size, frozen=reason)


def leaves(axis: Axis) -> Iterator[Axis]:
    """Yield the leaves of an axis in order; a leaf that occurs several times is yielded several times."""
    axis = find(axis)
    if axis.kind == "leaf":
        yield axis
    for part in axis.parts:
        yield from leaves(part)


def is_frozen(axis: Axis) -> bool:
    """Check whether all leaves of an axis are frozen."""
    axis = find(axis)
    return axis.frozen is not None if axis.kind == "leaf" else all(is_frozen(part) for part in axis.parts)


def freeze(axis: Axis, reason: str) -> None:
    """Freeze all leaves of an axis in place; a leaf that is frozen already keeps its reason."""
    for leaf in leaves(axis):
        if leaf.frozen is None:
            leaf.frozen = reason


def mark_batch(axis: Axis) -> None:
    """Mark all leaves of an axis, in place, as a batch dim of a product of two activations."""
    for leaf in leaves(axis):
        leaf.is_batch = True


def factors(axis: Axis) -> list[Axis]:
    """Return the factors of a product, the outermost first.

    Any other axis is its own only factor; an axis of size 1 has none.
    """
    axis = find(axis)
    if axis.size == 1:
        return []
    if axis.kind == "product":
        return [factor for part in axis.parts for factor in factors(part)]
    return [axis]


def pieces(axis: Axis) -> list[Axis]:
    """Return the pieces of a sum; any other axis is its own only piece."""
    axis = find(axis)
    if axis.kind == "sum":
        return [piece for part in axis.parts for piece in pieces(part)]
    return [axis]


def product(parts: Sequence[Axis]) -> Axis:
    """Compose factors into one axis, the outermost first."""
    parts = [factor for part in parts for factor in factors(part)]
    return _compose(parts, "product", math.prod(part.size for part in parts))


def concat(parts: Sequence[Axis]) -> Axis:
    """Compose pieces into one axis, in order."""
    parts = [piece for part in parts for piece in pieces(part)]
    return _compose(parts, "sum", sum(part.size for part in parts))


def _compose(parts: list[Axis], kind: Literal["product", "sum"], size: int) -> Axis:
    """Compose flat parts; if all of them are frozen, the result is a single frozen leaf."""
    if len(parts) == 1:
        return parts[0]
    reason = _common_reason(parts)
    if reason is not None or not parts:
        return Axis(size, frozen=reason)
    return Axis(size, tuple(parts), kind)


def _common_reason(parts: Iterable[Axis]) -> str | None:
    """Return the first reason if all parts are frozen leaves, else None."""
    reason = None
    for part in parts:
        part = find(part)
        if part.kind != "leaf" or part.frozen is None:
            return None
        reason = reason or part.frozen
    return reason


def reason_of(axis: Axis) -> str:
    """Return the reason why an axis, all of whose leaves are frozen, cannot be pruned."""
    axis = find(axis)
    while axis.kind != "leaf":
        axis = find(axis.parts[0])
    return axis.frozen or "one element"
