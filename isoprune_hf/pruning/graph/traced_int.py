"""Integers that remember where they come from: an attribute of a module, the size of an axis, or arithmetic on these.

A module computes sizes from numbers that it keeps (`num_heads`) and from shapes (`x.shape`), and hands them to views
and splits. An `Integer` is an int like any other, so the code runs as it is; what it hands over says which attribute,
or which axis, the number was.
"""

import math
import operator
from collections.abc import Callable, Iterator
from typing import Any, Literal, NamedTuple

from torch import nn

from isoprune_hf.pruning.graph.axis import Axis


class Attribute(NamedTuple):
    """A number that a module keeps, or an entry of a tuple of numbers.

    Args:
        module: Path of the module.
        name: The attribute.
        entry: Position in the tuple; None for a plain number.
    """

    module: str
    name: str
    entry: int | None = None


class Operation(NamedTuple):
    """Arithmetic on two expressions."""

    symbol: Literal["+", "-", "*", "//", "%"]
    left: "Expression"
    right: "Expression"


Expression = Attribute | Axis | Operation | int


class Comparison(NamedTuple):
    """A comparison that the code has made, and what came out."""

    symbol: Literal["==", "!=", "<", "<=", ">", ">="]
    left: Expression
    right: Expression
    outcome: bool


class Integer(int):
    """An int with its expression; comparisons are noted in `comparisons`, shared by all of one trace."""

    expression: Expression
    comparisons: list[Comparison]

    def __new__(cls, value: int, expression: Expression, comparisons: list[Comparison]) -> "Integer":
        made = super().__new__(cls, value)
        made.expression = expression
        made.comparisons = comparisons
        return made

    def __reduce__(self) -> tuple[type, tuple[int]]:
        return int, (int(self),)

    __hash__ = int.__hash__


def expression_of(value: int) -> Expression:
    """The expression of an integer; a plain one is a literal."""
    return value.expression if isinstance(value, Integer) else int(value)


def _arithmetic(symbol: str, compute: Callable[[int, int], int], *, is_reflected: bool) -> Callable[..., Any]:
    def apply(own: Integer, other: Any) -> Any:
        if type(other) is bool or not isinstance(other, int):
            return NotImplemented
        pair = (int(other), int(own)) if is_reflected else (int(own), int(other))
        expressions = (expression_of(other), own.expression)[:: 1 if is_reflected else -1]
        return Integer(compute(*pair), Operation(symbol, *expressions), own.comparisons)

    return apply


def _comparing(symbol: str, compare: Callable[[int, int], bool]) -> Callable[..., Any]:
    def apply(own: Integer, other: Any) -> Any:
        if isinstance(other, float) and math.isfinite(other) and symbol not in ("==", "!="):
            other = math.ceil(other) if symbol in ("<", ">=") else math.floor(other)  # the same for whole numbers
        if not isinstance(other, int):
            return compare(int(own), other)
        outcome = compare(int(own), int(other))
        own.comparisons.append(Comparison(symbol, own.expression, expression_of(other), outcome))
        return outcome

    return apply


ARITHMETIC: dict[str, Callable[[int, int], int]] = {
    "+": operator.add,
    "-": operator.sub,
    "*": operator.mul,
    "//": operator.floordiv,
    "%": operator.mod,
}
for _name, _symbol in (("add", "+"), ("sub", "-"), ("mul", "*"), ("floordiv", "//"), ("mod", "%")):
    setattr(Integer, f"__{_name}__", _arithmetic(_symbol, ARITHMETIC[_symbol], is_reflected=False))
    setattr(Integer, f"__r{_name}__", _arithmetic(_symbol, ARITHMETIC[_symbol], is_reflected=True))
COMPARE: dict[str, Callable[[int, int], bool]] = {
    "==": operator.eq,
    "!=": operator.ne,
    "<": operator.lt,
    "<=": operator.le,
    ">": operator.gt,
    ">=": operator.ge,
}
for _name, _symbol in (("eq", "=="), ("ne", "!="), ("lt", "<"), ("le", "<="), ("gt", ">"), ("ge", ">=")):
    setattr(Integer, f"__{_name}__", _comparing(_symbol, COMPARE[_symbol]))


def atoms(expression: Expression) -> Iterator[Attribute | Axis]:
    """Yield the attributes and axes of an expression."""
    if isinstance(expression, Operation):
        yield from atoms(expression.left)
        yield from atoms(expression.right)
    elif not isinstance(expression, int):
        yield expression


_NUMBERS = frozenset((int, tuple, list))


def mark_attributes(network: nn.Module) -> list[Comparison]:
    """Let all integers that modules keep remember their place, in place.

    Returns:
        The list that will hold what the code compares them with.
    """
    comparisons: list[Comparison] = []
    for path, module in network.named_modules():
        for name, value in vars(module).items():
            kind = type(value)
            if kind not in _NUMBERS or name.startswith("_"):
                continue
            if kind is int:
                module.__dict__[name] = Integer(value, Attribute(path, name), comparisons)
            elif value and all(type(entry) is int for entry in value):
                module.__dict__[name] = kind(
                    Integer(entry, Attribute(path, name, position), comparisons)
                    for position, entry in enumerate(value)
                )
    return comparisons
