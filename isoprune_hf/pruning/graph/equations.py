"""Which widths the code of a network allows: the equations of a trace, solved for the numbers that modules keep.

A size is a polynomial in the free leaves. An attribute that is the size of an axis follows that axis. What is left are
equations between sizes, as C = heads x dims where the code divides a width by a number of heads: then all leaves in
them are linked (they leave in the same proportion), or, where no proportion can fulfil them, frozen.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from isoprune_hf.pruning.graph.axis import Axis, find, freeze
from isoprune_hf.pruning.graph.trace import Equation, Trace
from isoprune_hf.pruning.graph.traced_int import Attribute, Comparison, Expression, Operation, atoms

# Monomials (leaves by identity, sorted) -> coefficients; the constant has the empty monomial.
Polynomial = dict[tuple[int, ...], int]
_CONSTANT = ()


class Unsolvable(Exception):
    """An expression that is no polynomial."""


@dataclass
class Solution:
    """What numbers of modules follow from sizes, and which sizes must keep their proportion.

    Args:
        attributes: Attribute -> its size as a polynomial, where that is no constant.
        links: Sets of leaves that leave in the same proportion, by identity.
        by_id: Identity -> leaf.
    """

    attributes: dict[Attribute, Polynomial] = field(default_factory=dict)
    links: list[set[int]] = field(default_factory=list)
    by_id: dict[int, Axis] = field(default_factory=dict)


def solve_equations(trace: Trace, values: Mapping[Attribute, int]) -> Solution:
    """Solve the equations of a trace; freezes, in place, what no proportion can fulfil.

    Args:
        trace: The trace.
        values: Attribute -> the number that it is now.
    """
    equations = [*trace.equations, *_from_comparisons(trace.comparisons)]
    quotients: dict[tuple, Axis] = {}
    while True:  # each round freezes something, or is the last
        solution = Solution()
        solver = _Solver(solution, values, quotients)
        rest = solver.define(equations)
        if not solver.link(rest):
            return solution


def _from_comparisons(comparisons: Iterable[Comparison]) -> Iterable[Equation]:
    """What was compared and equal stays equal."""
    for comparison in comparisons:
        if comparison.outcome == (comparison.symbol in ("==", "<=", ">=")) and comparison.symbol in ("==", "!="):
            yield Equation(comparison.left, comparison.right, "")


class _Solver:
    def __init__(self, solution: Solution, values: Mapping[Attribute, int], quotients: dict[tuple, Axis]):
        self.solution = solution
        self.values = values
        self.quotients = quotients
        self.divided: list[tuple[Polynomial, Polynomial, Equation]] = []
        self.known: dict[Attribute, Polynomial] = {}

    def define(self, equations: Iterable[Equation]) -> list[tuple[Polynomial, Polynomial, Equation]]:
        """Let attributes follow sizes, until nothing new is learnt; give the equations that are left."""
        pending = list(equations)
        rest: list[tuple[Polynomial, Polynomial, Equation]] = []
        learns = True
        while pending:
            waiting = []
            for equation in pending:
                unknown = {atom for side in equation[:2] for atom in atoms(side) if isinstance(atom, Attribute)}
                unknown -= self.known.keys()
                try:
                    if not unknown:
                        rest.append((self.value(equation.left), self.value(equation.right), equation))
                    elif len(unknown) == 1:
                        self._solve(equation, next(iter(unknown)))
                        learns = True
                    else:
                        waiting.append(equation)
                except Unsolvable as problem:
                    self.freeze(equation, str(problem))
            if not learns and waiting:  # what no equation names alone stays as it is
                unknown = {atom for side in waiting[0][:2] for atom in atoms(side) if isinstance(atom, Attribute)}
                attribute = min(unknown - self.known.keys(), key=str)
                self.known[attribute] = {_CONSTANT: self.values[attribute]}
            pending, learns = waiting, False
        self.solution.attributes = {
            attribute: polynomial for attribute, polynomial in self.known.items() if set(polynomial) != {_CONSTANT}
        }
        return [*rest, *self.divided]

    def freeze(self, equation: Equation, reason: str) -> None:
        """Let all sizes of an equation stay."""
        where = equation.module or "the model"
        for side in equation[:2]:
            for atom in atoms(side):
                if isinstance(atom, Axis):
                    freeze(atom, f"{where} computes a size that cannot be followed ({reason})")
                else:
                    for leaf in {leaf for monomial in self.known.get(atom, {}) for leaf in monomial}:
                        freeze(self.solution.by_id[leaf], f"{where} needs {atom.name} as it is ({reason})")

    def _solve(self, equation: Equation, attribute: Attribute) -> None:
        """Learn the one unknown attribute of an equation."""
        left, right = equation[:2]
        if any(atom == attribute for atom in atoms(right)):
            left, right = right, left
        if any(atom == attribute for atom in atoms(right)):
            raise Unsolvable("it occurs on both sides")
        size = self.value(right)
        while isinstance(left, Operation):
            in_left = any(atom == attribute for atom in atoms(left.left))
            if in_left and any(atom == attribute for atom in atoms(left.right)):
                raise Unsolvable("it occurs twice")
            other = self.value(left.right if in_left else left.left)
            try:
                size = _invert(left.symbol, size, other, in_left=in_left)
            except Unsolvable:
                if left.symbol != "*":
                    raise
                size = self.quotient(size, other, left)
            left = left.left if in_left else left.right
        now = self.evaluate_now(size)
        if now != self.values[attribute]:  # a quotient that was rounded
            raise Unsolvable(f"{attribute.name} is {self.values[attribute]}, not {now}")
        self.known[attribute] = size

    def evaluate_now(self, polynomial: Polynomial) -> int:
        """The number that a polynomial is before any cut."""
        return evaluate(polynomial, {leaf: axis.size for leaf, axis in self.solution.by_id.items()})

    def value(self, expression: Expression) -> Polynomial:
        """Write an expression as a polynomial."""
        if isinstance(expression, Attribute):
            return self.known[expression]
        if isinstance(expression, Operation):
            left, right = self.value(expression.left), self.value(expression.right)
            try:
                return _combine(expression.symbol, left, right)
            except Unsolvable:
                if expression.symbol != "//":
                    raise
                return self.quotient(left, right, expression)
        if isinstance(expression, int):
            return {_CONSTANT: int(expression)}
        return self.size(expression)

    def quotient(self, left: Polynomial, right: Polynomial, expression: Operation) -> Polynomial:
        """A quotient that is no polynomial as a size of its own: left == quotient x right."""
        value, rest = divmod(self.evaluate_now(left), self.evaluate_now(right))
        if rest:
            raise Unsolvable("a division with a rest")
        key = tuple(sorted(left.items())), tuple(sorted(right.items()))
        axis = self.quotients.setdefault(key, Axis(value))
        size = self.size(axis)
        self.divided.append((left, _combine("*", size, right), Equation(expression, axis, "")))
        return size

    def size(self, axis: Axis) -> Polynomial:
        """Write the size of an axis as a polynomial."""
        return size_polynomial(axis, self.solution.by_id)

    def link(self, rest: Iterable[tuple[Polynomial, Polynomial, Equation]]) -> bool:
        """Link the leaves of equations that are left; whether something had to be frozen, so that all changes."""
        has_frozen = False
        links = self.solution.links
        for left, right, equation in rest:
            difference = _combine("-", left, right)
            if not difference:
                continue
            where = f"{equation.module or 'the model'} computes sizes"
            members = {leaf for monomial in difference for leaf in monomial}
            if mixed := [monomial for monomial in difference if len(monomial) > 1]:
                # C = heads x dims: the heads stay, and C follows the dims.
                for monomial in mixed:
                    for leaf in _held(monomial, self.solution.by_id):
                        freeze(self.solution.by_id[leaf], f"{where} from it and another width")
                has_frozen = True
            elif _CONSTANT in difference:
                for leaf in members:
                    freeze(self.solution.by_id[leaf], f"{where} that no other width fulfils")
                has_frozen = has_frozen or bool(members)
            else:
                touching = [link for link in links if link & members]
                links[:] = [link for link in links if not link & members]
                links.append(members.union(*touching))
        for link in links:
            own = [self.solution.by_id[leaf] for leaf in link]
            if math.gcd(*(leaf.size for leaf in own)) < 2:
                has_frozen = True
                for leaf in own:
                    freeze(leaf, "widths that are linked have no common divisor")
        return has_frozen


def _held(monomial: tuple[int, ...], by_id: Mapping[int, Axis]) -> list[int]:
    """All but one factor of a product: heads and copies stay, the largest of the others may change."""
    order = sorted(set(monomial), key=lambda leaf: (by_id[leaf].is_copy, by_id[leaf].is_batch, -by_id[leaf].size))
    return order[1:] or order


def size_polynomial(axis: Axis, by_id: dict[int, Axis]) -> Polynomial:
    """Write the size of an axis as a polynomial in its free leaves, which are added to `by_id`."""
    axis = find(axis)
    if axis.kind == "leaf":
        if axis.frozen is not None or axis.size == 1:
            return {_CONSTANT: axis.size}
        by_id[id(axis)] = axis
        return {(id(axis),): 1}
    total = size_polynomial(axis.parts[0], by_id)
    for part in axis.parts[1:]:
        total = _combine("*" if axis.kind == "product" else "+", total, size_polynomial(part, by_id))
    return total


def _combine(symbol: str, left: Polynomial, right: Polynomial) -> Polynomial:
    if symbol in "+-":
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
    if set(left) <= {_CONSTANT} and set(right) == {_CONSTANT}:
        one, two = left.get(_CONSTANT, 0), right[_CONSTANT]
        value = one // two if symbol == "//" else one % two
        return {_CONSTANT: value} if value else {}
    quotient = _divide(left, right)
    return quotient if symbol == "//" else {}


def _divide(left: Polynomial, right: Polynomial) -> Polynomial:
    """Divide by a monomial, without rest."""
    if len(right) != 1:
        raise Unsolvable("a division by a sum")
    (divisor, factor), quotient = next(iter(right.items())), {}
    for monomial, count in left.items():
        remaining = list(monomial)
        for leaf in divisor:
            if leaf not in remaining:
                raise Unsolvable("a division with a rest")
            remaining.remove(leaf)
        if count % factor:
            raise Unsolvable("a division with a rest")
        quotient[tuple(remaining)] = count // factor
    return quotient


def _invert(symbol: str, size: Polynomial, other: Polynomial, *, in_left: bool) -> Polynomial:
    """Solve `x symbol other == size`, or `other symbol x == size`, for x."""
    if symbol == "+":
        return _combine("-", size, other)
    if symbol == "-":
        return _combine("+", size, other) if in_left else _combine("-", other, size)
    if symbol == "*":
        return _divide(size, other)
    if symbol == "//":
        return _combine("*", size, other) if in_left else _divide(other, size)
    raise Unsolvable("a remainder")


def evaluate(polynomial: Polynomial, sizes: Mapping[int, int]) -> int:
    """The number that a polynomial is for sizes of leaves, by identity."""
    return sum(count * math.prod(sizes[leaf] for leaf in monomial) for monomial, count in polynomial.items())


def freeze_compared(trace: Trace, solution: Solution) -> bool:
    """Freeze, in place, sizes that are compared with a number that lies between 1 and them; whether there was one."""
    found = False
    for comparison in trace.comparisons:
        sides = [comparison.left, comparison.right]
        numbers = [side for side in sides if isinstance(side, int)]
        others = [side for side in sides if not isinstance(side, int)]
        if len(numbers) != 1 or comparison.symbol in ("==", "!=") or numbers[0] < 2:
            continue
        for atom in atoms(others[0]):
            polynomial = (
                size_polynomial(atom, solution.by_id) if isinstance(atom, Axis) else solution.attributes.get(atom, {})
            )
            for leaf in {leaf for monomial in polynomial for leaf in monomial}:
                if solution.by_id[leaf].frozen is None:
                    freeze(solution.by_id[leaf], f"the code compares it with {numbers[0]}")
                    found = True
    return found
