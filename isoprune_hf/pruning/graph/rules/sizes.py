"""Integers in Python calls as sizes: functions that the size rules share, and the calls that need no rule.

Size rules see the call of a torch function, where an integer may still be a `TracedInt`; axis rules see the aten
operations that it consists of, where every integer is plain.
"""

import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from isoprune_hf.pruning.graph.axis import Axis, is_frozen
from isoprune_hf.pruning.graph.trace import Trace
from isoprune_hf.pruning.graph.traced_int import Expression, Operation, TracedInt, expression_of

# Calls whose integers are no sizes: operands of arithmetic, numbers of dims, kernels and strides.
CALLS_WITHOUT_SIZES = frozenset(
    (
        "__add__",
        "__eq__",
        "__floordiv__",
        "__ge__",
        "__get__",
        "__gt__",
        "__le__",
        "__lt__",
        "__mod__",
        "__mul__",
        "__ne__",
        "__pow__",
        "__radd__",
        "__rmul__",
        "__rpow__",
        "__rsub__",
        "__rtruediv__",
        "__sub__",
        "__truediv__",
        "add",
        "add_",
        "as_tensor",
        "avg_pool2d",
        "batch_norm",
        "cat",
        "clamp",
        "dim",
        "div",
        "div_",
        "dropout",
        "flatten",
        "floor_divide",
        "log_softmax",
        "masked_fill",
        "max_pool2d",
        "mean",
        "movedim",
        "mul",
        "mul_",
        "multiply",
        "normalize",
        "permute",
        "pow",
        "remainder",
        "rsub",
        "size",
        "softmax",
        "squeeze",
        "stack",
        "stride",
        "sub",
        "sub_",
        "sum",
        "tensor",
        "to",
        "transpose",
        "true_divide",
        "unbind",
        "unsqueeze",
    )
)


def flat_sizes(values: Sequence[Any]) -> Sequence[Any]:
    """Return sizes as one sequence, whether they were passed as `2, 3` or as `(2, 3)`."""
    first = values[0] if len(values) == 1 else None
    return first if isinstance(first, list | tuple) else values


def equate_sizes(trace: Trace, sizes: Iterable[Any], axes: Iterable[Axis]) -> None:
    """Record that sizes are those of axes, pairwise; -1 and values that are no integers are skipped."""
    for size, axis in zip(sizes, axes, strict=False):
        if isinstance(size, int) and size != -1:
            trace.equate_size(expression_of(size), axis)


def assume_constant(trace: Trace, args: Iterable[Any]) -> None:
    """Record that all traced integers in the arguments keep their values, because their meaning is unknown."""
    for arg in args:
        if isinstance(arg, list | tuple):
            assume_constant(trace, arg)
        elif isinstance(arg, TracedInt) and not isinstance(arg.expression, int):
            trace.equate(arg.expression, int(arg))


def traced_shape(trace: Trace, x: Tensor, shape: torch.Size) -> torch.Size:
    """Return a shape whose entries are traced integers for all axes that are not frozen."""
    return torch.Size(
        [
            size if size == 1 or is_frozen(axis) else TracedInt(size, axis, trace.comparisons)
            for size, axis in zip(shape, trace.axes(x), strict=True)
        ]
    )


def traced_count(trace: Trace, x: Tensor, count: int) -> int:
    """Return a number of elements as a traced integer, the product of the sizes of all axes that are not frozen."""
    axes = [axis for axis in trace.axes(x) if axis.size != 1 and not is_frozen(axis)]
    if not axes or not count:
        return count
    expression: Expression = axes[0]
    for axis in axes[1:]:
        expression = Operation("*", expression, axis)
    rest = count // math.prod(axis.size for axis in axes)
    if rest > 1:
        expression = Operation("*", rest, expression)
    return TracedInt(count, expression, trace.comparisons)
