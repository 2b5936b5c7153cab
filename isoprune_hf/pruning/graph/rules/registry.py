"""The types of rules, and `RuleTable`, in which a module lists its rules under the names of operations."""

from collections.abc import Callable, Iterable, Mapping
from types import MappingProxyType
from typing import Any, Protocol, TypeVar

from isoprune_hf.pruning.graph.trace import Axes, Trace


class AxisRule(Protocol):
    """A rule of an aten operation: ties, splits or freezes axes of its arguments and returns the axes of its output.

    Args:
        trace: The trace.
        out: The output of the operation.
        args: The arguments of the operation.

    Returns:
        The axes of the output, or a list with the axes of each output of an operation that has several.
    """

    def __call__(self, trace: Trace, out: Any, /, *args: Any, **kwargs: Any) -> Axes | list[Axes]: ...


class SizeRule(Protocol):
    """A rule of a Python call: records which axes the integers among the arguments are the sizes of.

    Args:
        trace: The trace.
        out: The result of the call.
        args: The arguments of the call, in which sizes may be traced integers.
    """

    def __call__(self, trace: Trace, out: Any, /, *args: Any, **kwargs: Any) -> None: ...


_RuleT = TypeVar("_RuleT", bound=Callable[..., Any])


class RuleTable(dict[str, Callable[..., Any]]):
    """Name of an operation -> its rule. An instance is a decorator: `@rule("view", "reshape")`."""

    def __call__(self, *names: str) -> Callable[[_RuleT], _RuleT]:
        """Return a decorator that lists a function under `names`."""

        def add(function: _RuleT) -> _RuleT:
            self.update(dict.fromkeys(names, function))
            return function

        return add


def merge_tables(tables: Iterable[RuleTable]) -> Mapping[str, Callable[..., Any]]:
    """Merge tables into one that cannot be changed.

    Raises:
        ValueError: Two tables list the same operation.
    """
    merged: dict[str, Callable[..., Any]] = {}
    for table in tables:
        if repeated := merged.keys() & table.keys():
            raise ValueError(f"operations with two rules: {', '.join(sorted(repeated))}")
        merged.update(table)
    return MappingProxyType(merged)
