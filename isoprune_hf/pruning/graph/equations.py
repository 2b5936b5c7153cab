"""The widths that the code of a network allows: `solve_equations` solves the equations of a trace for attributes.

The code of a network states that an expression of attributes and sizes is the size of an axis. Sizes are polynomials
in the free leaves (`polynomial.py`), so:

- An attribute that is the size of an axis becomes a polynomial: it is recomputed from the widths after a cut.
- An equation without an unknown attribute, such as C = heads x dims in code that divides a width by a number of heads,
  links its leaves: they are pruned in the same proportion.
- Leaves of an equation that no proportion satisfies are frozen.
"""

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from isoprune_hf.pruning.graph.axis import Axis, freeze
from isoprune_hf.pruning.graph.polynomial import (
    CONSTANT,
    Monomial,
    Polynomial,
    Unsolvable,
    combine,
    evaluate,
    invert,
    size_polynomial,
)
from isoprune_hf.pruning.graph.trace import Equation, Trace
from isoprune_hf.pruning.graph.traced_int import Attribute, Comparison, Expression, Operation, atoms

# Terms of a dividend and of a divisor -> the size of their quotient.
_Quotients = dict[tuple[tuple[tuple[Monomial, int], ...], ...], Axis]


@dataclass
class Solution:
    """The attributes that depend on sizes, and the leaves that are linked.

    Args:
        attributes: Attribute -> its value as a polynomial; attributes with a constant value are left out.
        links: Sets of leaves, by identity, that are pruned in the same proportion.
        by_id: Identity -> leaf.
    """

    attributes: dict[Attribute, Polynomial] = field(default_factory=dict)
    links: list[set[int]] = field(default_factory=list)
    by_id: dict[int, Axis] = field(default_factory=dict)


class _SolvedEquation(NamedTuple):
    """An equation with both sides as polynomials."""

    left: Polynomial
    right: Polynomial
    equation: Equation


def solve_equations(trace: Trace, values: Mapping[Attribute, int]) -> Solution:
    """Solve the equations of a trace; freezes, in place, the leaves of equations that no proportion satisfies.

    Args:
        trace: The trace.
        values: Attribute -> its value in the network that was traced.
    """
    equations = [*trace.equations, *_equalities(trace.comparisons)]
    quotients: _Quotients = {}
    while True:
        # A leaf that gets frozen becomes a constant in every equation, so everything is solved again. Each round but
        # the last freezes at least one leaf, so the loop ends.
        solver = _Solver(values, quotients)
        remaining = solver.define_attributes(equations)
        if not solver.link_leaves(remaining):
            return solver.solution


def _equalities(comparisons: Iterable[Comparison]) -> Iterator[Equation]:
    """Yield an equation for each pair of expressions that the code compared and found equal."""
    for comparison in comparisons:
        if (comparison.symbol, comparison.outcome) in (("==", True), ("!=", False)):
            yield Equation(comparison.left, comparison.right, "")


class _Solver:
    """One round of `solve_equations`."""

    def __init__(self, values: Mapping[Attribute, int], quotients: _Quotients):
        self.solution = Solution()
        self.values = values
        self.quotients = quotients
        self.known: dict[Attribute, Polynomial] = {}
        # left == quotient x right, for every quotient that is a size of its own
        self.divisions: list[_SolvedEquation] = []

    def define_attributes(self, equations: Iterable[Equation]) -> list[_SolvedEquation]:
        """Solve equations for attributes until no equation has an unknown one; returns those solved for none."""
        pending = list(equations)
        remaining: list[_SolvedEquation] = []
        has_learnt = True
        while pending:
            waiting = []
            for equation in pending:
                unknown = self._unknown_attributes(equation)
                try:
                    if not unknown:
                        sides = self.polynomial(equation.left), self.polynomial(equation.right)
                        remaining.append(_SolvedEquation(*sides, equation))
                    elif len(unknown) == 1:
                        self._solve_for(unknown.pop(), equation)
                        has_learnt = True
                    else:
                        waiting.append(equation)
                except Unsolvable as problem:
                    self._freeze_sizes(equation, str(problem))
            if not has_learnt and waiting:
                # Every equation has several unknown attributes. One of them keeps its value, so that the rest can be
                # solved.
                attribute = self._attribute_to_keep(waiting[0])
                self.known[attribute] = {CONSTANT: self.values[attribute]}
            pending = waiting
            has_learnt = False
        self.solution.attributes = {
            attribute: polynomial for attribute, polynomial in self.known.items() if set(polynomial) != {CONSTANT}
        }
        return [*remaining, *self.divisions]

    def _unknown_attributes(self, equation: Equation) -> set[Attribute]:
        sides = (*atoms(equation.left), *atoms(equation.right))
        return {atom for atom in sides if isinstance(atom, Attribute)} - self.known.keys()

    def _attribute_to_keep(self, equation: Equation) -> Attribute:
        """Return the first unknown attribute, by text, for whose current value the equation can be solved.

        In `in_channels // num_paths`, this is the number of paths. If there is none, return the first one.
        """
        candidates = sorted(self._unknown_attributes(equation), key=str)
        for attribute in candidates:
            trial = _Solver(self.values, dict(self.quotients))
            trial.known = {**self.known, attribute: {CONSTANT: self.values[attribute]}}
            others = trial._unknown_attributes(equation)
            try:
                if len(others) == 1:
                    trial._solve_for(others.pop(), equation)
                    return attribute
            except Unsolvable:
                continue
        return candidates[0]

    def _freeze_sizes(self, equation: Equation, reason: str) -> None:
        """Freeze all sizes of an equation in place."""
        where = equation.module or "the model"
        for atom in (*atoms(equation.left), *atoms(equation.right)):
            if isinstance(atom, Axis):
                freeze(atom, f"{where} computes a size that cannot be traced ({reason})")
            else:
                for leaf in _leaves_of(self.known.get(atom, {})):
                    freeze(self.solution.by_id[leaf], f"{where} depends on {atom.name} ({reason})")

    def _solve_for(self, attribute: Attribute, equation: Equation) -> None:
        """Solve an equation for its only unknown attribute.

        Raises:
            Unsolvable: The attribute occurs several times, is no polynomial, or does not have the value that results.
        """
        left, right = equation.left, equation.right
        if _contains(right, attribute):
            left, right = right, left
        if _contains(right, attribute):
            raise Unsolvable("it occurs on both sides")
        size = self.polynomial(right)
        while isinstance(left, Operation):  # move one operation after the other to the right side
            in_left = _contains(left.left, attribute)
            if in_left and _contains(left.right, attribute):
                raise Unsolvable("it occurs twice")
            other = self.polynomial(left.right if in_left else left.left)
            try:
                size = invert(left.symbol, size, other, in_left=in_left)
            except Unsolvable:
                if left.symbol != "*":
                    raise
                size = self._quotient(size, other, left)
            left = left.left if in_left else left.right
        value = self._current_value(size)
        if value != self.values[attribute]:  # the code rounded a quotient
            raise Unsolvable(f"{attribute.name} is {self.values[attribute]}, not {value}")
        self.known[attribute] = size

    def _current_value(self, polynomial: Polynomial) -> int:
        """Compute a polynomial for the widths of the network that was traced."""
        return evaluate(polynomial, {leaf: axis.size for leaf, axis in self.solution.by_id.items()})

    def polynomial(self, expression: Expression) -> Polynomial:
        """Write an expression of known attributes as a polynomial.

        Raises:
            Unsolvable: It is no polynomial.
        """
        if isinstance(expression, Attribute):
            return self.known[expression]
        if isinstance(expression, Operation):
            left, right = self.polynomial(expression.left), self.polynomial(expression.right)
            try:
                return combine(expression.symbol, left, right)
            except Unsolvable:
                if expression.symbol != "//":
                    raise
                return self._quotient(left, right, expression)
        if isinstance(expression, int):
            return {CONSTANT: int(expression)}
        return size_polynomial(expression, self.solution.by_id)

    def _quotient(self, left: Polynomial, right: Polynomial, expression: Operation) -> Polynomial:
        """Represent a quotient that is no polynomial by a leaf of its own, with the equation left == leaf x right."""
        value, remainder = divmod(self._current_value(left), self._current_value(right))
        if remainder:
            raise Unsolvable("a division with a remainder")
        key = tuple(sorted(left.items())), tuple(sorted(right.items()))
        axis = self.quotients.setdefault(key, Axis(value))
        size = size_polynomial(axis, self.solution.by_id)
        self.divisions.append(_SolvedEquation(left, combine("*", size, right), Equation(expression, axis, "")))
        return size

    def link_leaves(self, equations: Iterable[_SolvedEquation]) -> bool:
        """Link the leaves of each equation, or freeze them in place; returns whether a leaf was frozen."""
        has_frozen = False
        for left, right, equation in equations:
            difference = combine("-", left, right)
            if not difference:
                continue
            where = f"{equation.module or 'the model'} computes sizes"
            leaves = _leaves_of(difference)
            if mixed := [monomial for monomial in difference if len(monomial) > 1]:
                # C = heads x dims: the heads are frozen, then C follows the dims.
                for leaf in (leaf for monomial in mixed for leaf in _leaves_to_freeze(monomial, self.solution.by_id)):
                    freeze(self.solution.by_id[leaf], f"{where} from it and another width")
                has_frozen = True
            elif CONSTANT in difference:
                for leaf in leaves:
                    freeze(self.solution.by_id[leaf], f"{where} that are right for the current width only")
                has_frozen = has_frozen or bool(leaves)
            else:
                self._link(leaves)
        return self._freeze_indivisible_links() or has_frozen

    def _link(self, leaves: set[int]) -> None:
        """Add a link, merged with all links that share a leaf with it."""
        links = self.solution.links
        overlapping = [link for link in links if link & leaves]
        links[:] = [link for link in links if not link & leaves]
        links.append(leaves.union(*overlapping))

    def _freeze_indivisible_links(self) -> bool:
        """Freeze, in place, the links whose sizes share no divisor: no proportion but 1 keeps them whole."""
        has_frozen = False
        for link in self.solution.links:
            linked = [self.solution.by_id[leaf] for leaf in link]
            if math.gcd(*(leaf.size for leaf in linked)) < 2:
                has_frozen = True
                for leaf in linked:
                    freeze(leaf, "linked widths have no common divisor")
        return has_frozen


def _contains(expression: Expression, attribute: Attribute) -> bool:
    return any(atom == attribute for atom in atoms(expression))


def _leaves_of(polynomial: Polynomial) -> set[int]:
    return {leaf for monomial in polynomial for leaf in monomial}


def _leaves_to_freeze(monomial: Monomial, by_id: Mapping[int, Axis]) -> list[int]:
    """Return all leaves of a product but one: the largest that is neither a copy nor a number of heads stays free."""
    order = sorted(set(monomial), key=lambda leaf: (by_id[leaf].is_copy, by_id[leaf].is_batch, -by_id[leaf].size))
    return order[1:] or order
