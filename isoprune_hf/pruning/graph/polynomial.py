"""Sizes as polynomials in the sizes of free leaves: arithmetic, and `evaluate` for given sizes.

A monomial is the sorted tuple of the identities of its leaves; the constant has the empty monomial. For example, the
size 2 * heads * dims + 1 is {(id(heads), id(dims)): 2, (): 1}.
"""

import math
from collections.abc import Mapping

from isoprune_hf.pruning.graph.axis import Axis, find
from isoprune_hf.pruning.graph.traced_int import ArithmeticSymbol

Monomial = tuple[int, ...]
Polynomial = dict[Monomial, int]
CONSTANT: Monomial = ()


class Unsolvable(Exception):
    """An expression is not a polynomial, or cannot be solved for the attribute in it."""


def size_polynomial(axis: Axis, by_id: dict[int, Axis]) -> Polynomial:
    """Write the size of an axis as a polynomial in its free leaves, which are added to `by_id`."""
    axis = find(axis)
    if axis.kind == "leaf":
        if axis.frozen is not None or axis.size == 1:
            return {CONSTANT: axis.size}
        by_id[id(axis)] = axis
        return {(id(axis),): 1}
    total = size_polynomial(axis.parts[0], by_id)
    for part in axis.parts[1:]:
        total = combine("*" if axis.kind == "product" else "+", total, size_polynomial(part, by_id))
    return total


def evaluate(polynomial: Polynomial, sizes: Mapping[int, int]) -> int:
    """Compute a polynomial for the sizes of its leaves, by identity."""
    return sum(count * math.prod(sizes[leaf] for leaf in monomial) for monomial, count in polynomial.items())


def combine(symbol: ArithmeticSymbol, left: Polynomial, right: Polynomial) -> Polynomial:
    """Compute `left symbol right`.

    Raises:
        Unsolvable: The quotient is not a polynomial.
    """
    if symbol in ("+", "-"):
        sign = 1 if symbol == "+" else -1
        total = dict(left)
        for monomial, count in right.items():
            total[monomial] = total.get(monomial, 0) + sign * count
        return {monomial: count for monomial, count in total.items() if count}
    if symbol == "*":
        total = {}
        for first, one in left.items():
            for second, two in right.items():
                monomial = tuple(sorted(first + second))
                total[monomial] = total.get(monomial, 0) + one * two
        return {monomial: count for monomial, count in total.items() if count}
    if set(left) <= {CONSTANT} and set(right) == {CONSTANT}:
        one, two = left.get(CONSTANT, 0), right[CONSTANT]
        value = one // two if symbol == "//" else one % two
        return {CONSTANT: value} if value else {}
    quotient = divide(left, right)
    return quotient if symbol == "//" else {}  # `divide` accepts exact divisions only, so the remainder is 0


def divide(left: Polynomial, right: Polynomial) -> Polynomial:
    """Divide by a monomial.

    Raises:
        Unsolvable: The divisor is a sum, or the division has a remainder.
    """
    if len(right) != 1:
        raise Unsolvable("a division by a sum")
    ((divisor, factor),) = right.items()
    quotient: Polynomial = {}
    for monomial, count in left.items():
        remaining = list(monomial)
        for leaf in divisor:
            if leaf not in remaining:
                raise Unsolvable("a division with a remainder")
            remaining.remove(leaf)
        if count % factor:
            raise Unsolvable("a division with a remainder")
        quotient[tuple(remaining)] = count // factor
    return quotient


def invert(symbol: ArithmeticSymbol, size: Polynomial, other: Polynomial, *, in_left: bool) -> Polynomial:
    """Solve `x symbol other == size`, or `other symbol x == size` if not `in_left`, for x.

    Raises:
        Unsolvable: x is not a polynomial, or the symbol is `%`.
    """
    if symbol == "+":
        return combine("-", size, other)
    if symbol == "-":
        return combine("+", size, other) if in_left else combine("-", other, size)
    if symbol == "*":
        return divide(size, other)
    if symbol == "//":
        return combine("*", size, other) if in_left else divide(other, size)
    raise Unsolvable("a remainder")
