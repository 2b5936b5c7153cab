"""Unification of axes: `unify` makes two axes the same axis, `split_factor` and `split_at` refine one.

Unifying works as it does for types in a programming language: if one of two axes is a product or a sum, the other
becomes the same product or sum, together with every axis that it was unified with before.
"""

import bisect
import itertools
import math
from collections.abc import Sequence

from isoprune_hf.pruning.graph.axis import Axis, concat, factors, find, freeze, leaves, mark_batch, pieces, product


class Conflict(Exception):
    """Two axes cannot be the same axis, or an axis cannot be split as asked, because their parts do not align."""


def unify(first: Axis, second: Axis) -> Axis:
    """Make two axes of equal size the same axis, in place.

    Raises:
        Conflict: Their parts do not align; parts that were unified before the conflict stay unified.
    """
    first, second = find(first), find(second)
    if first is second or first.size == second.size == 1:  # an axis of one element is never pruned, so never tied
        return first
    if first.size != second.size:
        raise Conflict(f"sizes {first.size} and {second.size} differ")
    if first.kind != "leaf" and second.kind == "leaf":
        first, second = second, first
    if first.kind == "leaf":
        return _bind(first, second)
    if first.kind == second.kind == "product":
        return _unify_products(first, second)
    if first.kind == second.kind == "sum":
        return _unify_sums(first, second)
    if first.kind == "sum":
        return _unify_sum_with_product(first, second)
    return _unify_sum_with_product(second, first)


def _bind(leaf: Axis, other: Axis) -> Axis:
    """Redirect a leaf to another axis, which takes over its marks."""
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


def _unify_products(first: Axis, second: Axis) -> Axis:
    """Unify two products factor by factor, from the outermost; unequal factors are split to a common size."""
    left = factors(first)[::-1]  # stacks: the outermost factor is the last entry
    right = factors(second)[::-1]
    while left and right:
        one, two = left.pop(), right.pop()
        if one.size == two.size:
            unify(one, two)
        elif one.size > two.size:
            left += reversed(_split_outer(one, two.size))
            right.append(two)
        else:
            right += reversed(_split_outer(two, one.size))
            left.append(one)
    return _redirect(second, first)


def _unify_sums(first: Axis, second: Axis) -> Axis:
    """Split both sums at the boundaries of either, and unify the pieces pairwise."""
    points = sorted({*_boundaries(first), *_boundaries(second)})
    for one, two in zip(split_at(first, points), split_at(second, points), strict=True):
        unify(one, two)
    return _redirect(second, first)


def _unify_sum_with_product(total: Axis, whole: Axis) -> Axis:
    """Turn the outer factor of the product into a sum; all pieces of `total` share the inner factors."""
    for piece, part in zip(pieces(total), split_at(whole, _boundaries(total)), strict=True):
        unify(piece, part)
    return _redirect(total, whole)


def _redirect(axis: Axis, other: Axis) -> Axis:
    axis, other = find(axis), find(other)
    if axis is not other:
        axis.ref = other
    return other


def _boundaries(axis: Axis) -> list[int]:
    """Return the positions where pieces of an axis begin or end, 0 and its size included."""
    return [0, *itertools.accumulate(piece.size for piece in pieces(axis))]


def split_factor(axis: Axis, inner: int) -> tuple[Axis, Axis]:
    """Split an axis, in place, into an outer factor and an inner factor of `inner` elements.

    Raises:
        Conflict: `inner` does not divide the axis, or its parts do not allow the split.
    """
    axis = find(axis)
    if not inner or axis.size % inner:
        raise Conflict(f"the factors of {axis.size} elements do not fit")
    outer_factor = Axis(axis.size // inner, frozen=axis.frozen, is_copy=axis.is_copy)
    inner_factor = Axis(inner, frozen=axis.frozen, is_copy=axis.is_copy)
    whole = Axis(axis.size, (outer_factor, inner_factor), "product")
    if axis.kind == "leaf":
        outer_factor.is_batch = inner_factor.is_batch = axis.is_batch
        axis.ref = whole
    else:
        unify(axis, whole)
    return outer_factor, inner_factor


def _split_outer(axis: Axis, outer: int) -> list[Axis]:
    """Split an axis so that its outermost factor has `outer` elements, and return its factors."""
    split_factor(axis, axis.size // outer if axis.size % outer == 0 else 0)
    return factors(axis)


def split_at(axis: Axis, points: Sequence[int]) -> list[Axis]:
    """Split an axis, in place, into pieces at all `points` inside it, and return the parts between the points.

    Raises:
        Conflict: A point lies inside a factor.
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
        return _split_product_at(axis, points)
    found: dict[int, list[Axis]] = {}  # number of the part -> its pieces
    for piece, (low, high) in zip(pieces(axis), itertools.pairwise(_boundaries(axis)), strict=True):
        start = low
        for part in split_at(piece, [point - low for point in points if low < point < high]):
            found.setdefault(bisect.bisect_right(points, start), []).append(part)
            start += part.size
    return [concat(parts) for parts in found.values()]


def _split_product_at(axis: Axis, points: Sequence[int]) -> list[Axis]:
    """Split the outer factors of a product; the inner factors stay whole and are shared by all parts.

    The inner factors are those whose product divides every point. If the points need a finer division than the
    factors have, the next factor is split first.
    """
    step = math.gcd(*points)
    outer = factors(axis)
    inner: list[Axis] = []
    size = 1  # of all inner factors together
    while outer and step % (size * outer[-1].size) == 0:
        inner.insert(0, outer.pop())
        size *= inner[0].size
    if size < step and step // size < outer[-1].size:
        split_factor(outer[-1], step // size)
        return _split_product_at(axis, points)
    if size < step or not outer or not inner:
        raise Conflict(f"a split at {list(points[1:-1])} lies inside a factor")
    return [product([part, *inner]) for part in split_at(product(outer), [point // size for point in points])]
