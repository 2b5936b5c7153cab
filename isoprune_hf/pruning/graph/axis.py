"""The algebra of axes: what a dimension of a tensor is made of, and what follows when two dimensions are the same one.

An axis is a leaf, a product of digits (a view has merged them, the outermost first), or a sum of segments (they were
concatenated). Making two axes the same is the unification of two such trees: where one is refined, the other follows.
A leaf is free, or frozen with a reason: nothing can leave from it.
"""

import bisect
import itertools
import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Literal


class Conflict(Exception):
    """Two axes cannot be the same one: their parts do not fit."""


class Axis:
    """One dimension, or a part of one.

    Args:
        size: Elements.
        parts: Digits of a product or segments of a sum.
        kind: How the parts are put together.
        frozen: Why nothing can leave; only of leaves.
        is_copy: Made by copying a single element (expand, repeat): it stands for a number, not for channels.
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
        self.is_batch = False  # a batch dim of a product of two activations: the heads of an attention
        self.ref: Axis | None = None

    def __repr__(self) -> str:
        axis = find(self)
        if axis.kind == "leaf":
            return f"{axis.size}{'!' if axis.frozen else ''}"
        return "(" + (" x " if axis.kind == "product" else " + ").join(map(repr, axis.parts)) + ")"


def find(axis: Axis) -> Axis:
    """Follow an axis to what it has become; the way there is shortened for the next time."""
    while (other := axis.ref) is not None:
        if other.ref is not None:
            axis.ref = other.ref
        axis = other
    return axis


def frozen(size: int, reason: str) -> Axis:
    """Make an axis that nothing can leave from."""
    return Axis(size, frozen=reason)


def leaves(axis: Axis) -> Iterator[Axis]:
    """Yield the leaves in order; one that occurs several times, several times."""
    axis = find(axis)
    if axis.kind == "leaf":
        yield axis
    for part in axis.parts:
        yield from leaves(part)


def is_frozen(axis: Axis) -> bool:
    """Whether nothing at all can leave."""
    axis = find(axis)
    return axis.frozen is not None if axis.kind == "leaf" else all(is_frozen(part) for part in axis.parts)


def freeze(axis: Axis, reason: str) -> None:
    """Let nothing leave, in place; the first reason stays."""
    for leaf in leaves(axis):
        if leaf.frozen is None:
            leaf.frozen = reason


def digits(axis: Axis) -> list[Axis]:
    """The digits of a product, the outermost first; any other axis is a digit itself, size 1 is none."""
    axis = find(axis)
    if axis.size == 1:
        return []
    if axis.kind == "product":
        return [digit for part in axis.parts for digit in digits(part)]
    return [axis]


def segments(axis: Axis) -> list[Axis]:
    """The segments of a sum; any other axis is a segment itself."""
    axis = find(axis)
    if axis.kind == "sum":
        return [segment for part in axis.parts for segment in segments(part)]
    return [axis]


def product(parts: Sequence[Axis]) -> Axis:
    """Put digits together, the outermost first."""
    parts = [digit for part in parts for digit in digits(part)]
    if len(parts) == 1:
        return parts[0]
    size = math.prod(part.size for part in parts)
    reason = _common_reason(parts)
    if reason is not None or not parts:
        return Axis(size, frozen=reason)
    return Axis(size, tuple(parts), "product")


def join(parts: Sequence[Axis]) -> Axis:
    """Put segments behind one another."""
    parts = [segment for part in parts for segment in segments(part)]
    if len(parts) == 1:
        return parts[0]
    size = sum(part.size for part in parts)
    reason = _common_reason(parts)
    if reason is not None or not parts:
        return Axis(size, frozen=reason)
    return Axis(size, tuple(parts), "sum")


def _common_reason(parts: Iterable[Axis]) -> str | None:
    """The reason why all parts are frozen, or None where one is not."""
    reason = None
    for part in parts:
        part = find(part)
        if part.kind != "leaf" or part.frozen is None:
            return None
        reason = reason or part.frozen
    return reason


def unify(first: Axis, second: Axis) -> Axis:
    """Make two axes of equal size the same one, in place.

    Raises:
        Conflict: Their parts do not fit; what was unified before that stays.
    """
    first, second = find(first), find(second)
    if first is second or first.size == second.size == 1:  # one element is nothing that could leave
        return first
    if first.size != second.size:
        raise Conflict(f"{first.size} elements meet {second.size}")
    if first.kind != "leaf" and second.kind == "leaf":
        first, second = second, first
    if first.kind == "leaf":
        return _bind(first, second)
    if first.kind == second.kind == "product":
        return _unify_products(first, second)
    if first.kind == second.kind == "sum":
        return _unify_sums(first, second)
    return _unify_sum_with_product(*((first, second) if first.kind == "sum" else (second, first)))


def _bind(leaf: Axis, other: Axis) -> Axis:
    if other.kind != "leaf" and any(part is leaf for part in leaves(other)):
        raise Conflict(f"an axis of {leaf.size} elements would be a part of itself")
    leaf.ref = other
    if leaf.frozen is not None:
        freeze(other, leaf.frozen)
    if other.kind == "leaf":
        other.is_copy = other.is_copy and leaf.is_copy
        other.is_batch = other.is_batch or leaf.is_batch
    elif leaf.is_batch:
        mark_batch(other)
    return other


def mark_batch(axis: Axis) -> None:
    """Note, in place, that an axis is a batch dim of a product of two activations."""
    for leaf in leaves(axis):
        leaf.is_batch = True


def split_digit(axis: Axis, inner: int) -> tuple[Axis, Axis]:
    """Split an axis, in place, into an outer digit and an inner one of `inner` elements.

    Raises:
        Conflict: Its parts do not allow that.
    """
    axis = find(axis)
    if not inner or axis.size % inner:
        raise Conflict(f"the digits of {axis.size} elements do not fit")
    outer = Axis(axis.size // inner, frozen=axis.frozen, is_copy=axis.is_copy)
    low = Axis(inner, frozen=axis.frozen, is_copy=axis.is_copy)
    whole = Axis(axis.size, (outer, low), "product")
    if axis.kind == "leaf":
        outer.is_batch = low.is_batch = axis.is_batch
        axis.ref = whole
    else:
        unify(axis, whole)
    return outer, low


def _unify_products(first: Axis, second: Axis) -> Axis:
    left, right = digits(first)[::-1], digits(second)[::-1]  # stacks: the outermost digit is the last entry
    while left and right:
        one, two = left.pop(), right.pop()
        if one.size == two.size:
            unify(one, two)
        elif one.size > two.size:
            left += reversed(_outer_digits(one, two.size))
            right.append(two)
        else:
            right += reversed(_outer_digits(two, one.size))
            left.append(one)
    return _refer(second, first)


def _outer_digits(axis: Axis, outer: int) -> list[Axis]:
    """Split an axis so that its outermost digit has `outer` elements."""
    split_digit(axis, axis.size // outer if axis.size % outer == 0 else 0)
    return digits(axis)


def _unify_sums(first: Axis, second: Axis) -> Axis:
    points = sorted({*_bounds(first), *_bounds(second)})
    for one, two in zip(cut(first, points), cut(second, points), strict=True):
        unify(one, two)
    return _refer(second, first)


def _unify_sum_with_product(total: Axis, whole: Axis) -> Axis:
    """The outer digit of the product becomes a sum; all segments share the inner digits."""
    for segment, part in zip(segments(total), cut(whole, _bounds(total)), strict=True):
        unify(segment, part)
    return _refer(total, whole)


def _refer(axis: Axis, other: Axis) -> Axis:
    axis, other = find(axis), find(other)
    if axis is not other:
        axis.ref = other
    return other


def _bounds(axis: Axis) -> list[int]:
    """Where the segments of an axis begin and end."""
    return [0, *itertools.accumulate(segment.size for segment in segments(axis))]


def cut(axis: Axis, points: Sequence[int]) -> list[Axis]:
    """Cut an axis, in place, at all points inside it; give the parts between the points.

    Raises:
        Conflict: A point lies inside a digit.
    """
    axis = find(axis)
    points = sorted({0, *points, axis.size})
    if len(points) == 2:
        return [axis]
    if axis.kind == "leaf":
        sizes = (high - low for low, high in itertools.pairwise(points))
        parts = [Axis(size, frozen=axis.frozen, is_copy=axis.is_copy) for size in sizes]
        axis.ref = Axis(axis.size, tuple(parts), "sum")
        return parts
    if axis.kind == "product":
        return _cut_product(axis, points)
    pieces: dict[int, list[Axis]] = {}
    for segment, (low, high) in zip(segments(axis), itertools.pairwise(_bounds(axis)), strict=True):
        start = low
        for part in cut(segment, [point - low for point in points if low < point < high]):
            pieces.setdefault(bisect.bisect_right(points, start), []).append(part)
            start += part.size
    return [join(piece) for piece in pieces.values()]


def _cut_product(axis: Axis, points: Sequence[int]) -> list[Axis]:
    """Cut the outer digits of a product; the inner ones stay whole."""
    step = math.gcd(*points)
    outer, inner, size = digits(axis), [], 1
    while outer and step % (size * outer[-1].size) == 0:
        inner.insert(0, outer.pop())
        size *= inner[0].size
    if size < step and step // size < outer[-1].size:
        split_digit(outer[-1], step // size)
        return _cut_product(axis, points)
    if size < step or not outer or not inner:
        raise Conflict(f"a cut at {list(points[1:-1])} lies inside a digit")
    return [product([part, *inner]) for part in cut(product(outer), [point // size for point in points])]
