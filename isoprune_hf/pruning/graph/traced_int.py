"""Integers that record where they come from: `TracedInt`, and `mark_attributes` to put them into a network.

A module computes sizes from its integer attributes (`num_heads`) and from shapes (`x.shape`), and passes them to views
and splits. A `TracedInt` is an int with the expression that it was computed by, so the code of the network runs
unchanged and the tracer can read which attribute or axis each size came from. The operators `+ - * // %` extend the
expression; comparisons are recorded. Any other operation returns a plain number.
"""

import math
import operator
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal, NamedTuple

from torch import nn

from isoprune_hf.checkpoint.difference import number_tables
from isoprune_hf.pruning.graph.axis import Axis

ArithmeticSymbol = Literal["+", "-", "*", "//", "%"]
ComparisonSymbol = Literal["==", "!=", "<", "<=", ">", ">="]
ARITHMETIC: Mapping[ArithmeticSymbol, Callable[[int, int], int]] = {
    "+": operator.add,
    "-": operator.sub,
    "*": operator.mul,
    "//": operator.floordiv,
    "%": operator.mod,
}
COMPARE: Mapping[ComparisonSymbol, Callable[[Any, Any], bool]] = {
    "==": operator.eq,
    "!=": operator.ne,
    "<": operator.lt,
    "<=": operator.le,
    ">": operator.gt,
    ">=": operator.ge,
}
_COLLECTIONS = (tuple, list)


class Attribute(NamedTuple):
    """An integer attribute of a module or of its config, or an entry of a tuple or list of integers.

    Args:
        module: Path of the module; for a config that several modules share, of the first of them.
        name: Name of the attribute, or CONFIG.ENTRY.
        entry: Position in the tuple or list; None for a plain integer.
    """

    module: str
    name: str
    entry: int | None = None

    @property
    def table(self) -> tuple[str, str]:
        """The key of its table in `number_tables`."""
        return self.module, self.name.rpartition(".")[0]

    @property
    def key(self) -> str:
        """Its name in that table."""
        return self.name.rpartition(".")[2]


class Operation(NamedTuple):
    """Arithmetic on two expressions."""

    symbol: ArithmeticSymbol
    left: "Expression"
    right: "Expression"


Expression = Attribute | Axis | Operation | int


class Comparison(NamedTuple):
    """A comparison made by the code of a network, with its outcome."""

    symbol: ComparisonSymbol
    left: Expression
    right: Expression
    outcome: bool


class TracedInt(int):
    """An int with its expression. All traced integers of one trace append to the same list `comparisons`."""

    expression: Expression
    comparisons: list[Comparison]

    def __new__(cls, value: int, expression: Expression, comparisons: list[Comparison]) -> "TracedInt":
        made = super().__new__(cls, value)
        made.expression = expression
        made.comparisons = comparisons
        return made

    def __reduce__(self) -> tuple[type[int], tuple[int]]:
        return int, (int(self),)

    __hash__ = int.__hash__  # Python drops the inherited hash of a class that defines __eq__

    def __add__(self, other: int) -> int:
        return self._compute("+", self, other)

    def __radd__(self, other: int) -> int:
        return self._compute("+", other, self)

    def __sub__(self, other: int) -> int:
        return self._compute("-", self, other)

    def __rsub__(self, other: int) -> int:
        return self._compute("-", other, self)

    def __mul__(self, other: int) -> int:
        return self._compute("*", self, other)

    def __rmul__(self, other: int) -> int:
        return self._compute("*", other, self)

    def __floordiv__(self, other: int) -> int:
        return self._compute("//", self, other)

    def __rfloordiv__(self, other: int) -> int:
        return self._compute("//", other, self)

    def __mod__(self, other: int) -> int:
        return self._compute("%", self, other)

    def __rmod__(self, other: int) -> int:
        return self._compute("%", other, self)

    def __eq__(self, other: object) -> bool:
        return self._compare("==", other)

    def __ne__(self, other: object) -> bool:
        return self._compare("!=", other)

    def __lt__(self, other: int) -> bool:
        return self._compare("<", other)

    def __le__(self, other: int) -> bool:
        return self._compare("<=", other)

    def __gt__(self, other: int) -> bool:
        return self._compare(">", other)

    def __ge__(self, other: int) -> bool:
        return self._compare(">=", other)

    def _compute(self, symbol: ArithmeticSymbol, left: int, right: int) -> int:
        """Compute `left symbol right`, one of which is `self`, with its expression."""
        other = right if left is self else left
        if type(other) is bool or not isinstance(other, int):
            return NotImplemented  # type: ignore[no-any-return]  # mypy allows it only inside the operator itself
        value = ARITHMETIC[symbol](int(left), int(right))
        return TracedInt(value, Operation(symbol, expression_of(left), expression_of(right)), self.comparisons)

    def _compare(self, symbol: ComparisonSymbol, other: object) -> bool:
        """Compute `self symbol other`, and record it if it is a comparison of integers."""
        if isinstance(other, float) and math.isfinite(other) and symbol not in ("==", "!="):
            # For whole numbers, a fraction as a bound is the same as the next whole number.
            other = math.ceil(other) if symbol in ("<", ">=") else math.floor(other)
        if not isinstance(other, int):
            return COMPARE[symbol](int(self), other)
        outcome = COMPARE[symbol](int(self), int(other))
        self.comparisons.append(Comparison(symbol, self.expression, expression_of(other), outcome))
        return outcome


def expression_of(value: int) -> Expression:
    """Return the expression of an integer; a plain int is a literal."""
    return value.expression if isinstance(value, TracedInt) else int(value)


def atoms(expression: Expression) -> Iterator[Attribute | Axis]:
    """Yield the attributes and axes of an expression, from left to right."""
    if isinstance(expression, Operation):
        yield from atoms(expression.left)
        yield from atoms(expression.right)
    elif not isinstance(expression, int):
        yield expression


def mark_attributes(network: nn.Module) -> list[Comparison]:
    """Replace the integers that all modules and their configs keep by traced integers, in place.

    Returns:
        The list to which all comparisons with these integers will be appended.
    """
    comparisons: list[Comparison] = []
    for (path, owner), table in number_tables(network).items():
        prefix = f"{owner}." if owner else ""
        for name, value in table.items():
            if not isinstance(name, str) or name.startswith("_"):
                continue
            if type(value) is int:
                table[name] = TracedInt(value, Attribute(path, prefix + name), comparisons)
            elif type(value) in _COLLECTIONS and value and all(type(entry) is int for entry in value):
                table[name] = type(value)(
                    TracedInt(entry, Attribute(path, prefix + name, position), comparisons)
                    for position, entry in enumerate(value)
                )
    return comparisons
