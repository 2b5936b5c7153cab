"""What calls say about sizes: each number that is handed to a view, a split or a norm is the size of some axis.

The rules here sit on Python's calls, where numbers still remember where they come from (`integers`); those of `layout`
and `compute` sit on what PyTorch makes of the calls.
"""

import itertools
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from isoprune_hf.pruning.graph.axis import Axis, Conflict, cut, digits, freeze, is_frozen
from isoprune_hf.pruning.graph.trace import Trace
from isoprune_hf.pruning.graph.traced_int import Expression, Integer, Operation, expression_of

SIZES: dict[str, Callable[..., None]] = {}
# Calls that compute with a number, so that it says nothing about a size, or whose numbers are dims.
PLAIN = frozenset(
    (
        *("add", "sub", "mul", "div", "pow", "rsub", "true_divide", "floor_divide", "remainder", "multiply", "add_"),
        *("sub_", "mul_", "div_", "clamp", "masked_fill", "__add__", "__radd__", "__sub__", "__rsub__", "__mul__"),
        *("__rmul__", "__truediv__", "__rtruediv__", "__pow__", "__rpow__", "__floordiv__", "__mod__", "__eq__"),
        *("__ne__", "__lt__", "__le__", "__gt__", "__ge__", "__get__", "size", "dim", "stride", "numel", "tensor"),
        *("as_tensor", "to", "dropout", "softmax", "log_softmax", "sum", "mean", "normalize", "transpose", "permute"),
        *("flatten", "squeeze", "unsqueeze", "unbind", "movedim", "cat", "stack", "max_pool2d", "avg_pool2d"),
        "batch_norm",
    )
)


def says(*names: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Register what calls of these names say."""

    def register(function: Callable[..., None]) -> Callable[..., None]:
        SIZES.update(dict.fromkeys(names, function))
        return function

    return register


def _flat(values: Sequence[Any]) -> Sequence[Any]:
    """Sizes as one sequence, however they were given."""
    return values[0] if len(values) == 1 and isinstance(values[0], list | tuple) else values


def _each(trace: Trace, sizes: Iterable[Any], axes: Iterable[Axis]) -> None:
    for size, axis in zip(sizes, axes, strict=False):
        if isinstance(size, int) and size != -1:
            trace.state(expression_of(size), axis)


@says("view", "reshape", "expand", "broadcast_to")
def _view(trace: Trace, out: Tensor, x: Tensor, *sizes: Any, **kwargs: Any) -> None:
    sizes = _flat(sizes or (kwargs.get("shape", kwargs.get("size", ())),))
    if all(isinstance(size, int) for size in sizes):
        _each(trace, sizes, trace.axes(out)[out.ndim - len(sizes) :])


@says("unflatten")
def _unflatten(trace: Trace, out: Tensor, x: Tensor, dim: int, sizes: Sequence[int]) -> None:
    _each(trace, sizes, trace.axes(out)[dim % x.ndim :])


@says("view_as", "reshape_as", "expand_as")
def _view_as(trace: Trace, out: Tensor, x: Tensor, other: Tensor) -> None:
    for axis, wanted in zip(trace.axes(out), trace.axes(other), strict=True):
        trace.state(wanted, axis)


@says("repeat")
def _repeat(trace: Trace, out: Tensor, x: Tensor, *counts: Any) -> None:
    counts, axes = _flat(counts), trace.axes(out)
    given = [None] * (len(counts) - x.ndim) + list(trace.axes(x))
    for count, axis, old in zip(counts, axes, given, strict=True):
        if old is None or old.size == 1:
            trace.state(expression_of(count), axis)
        elif int(count) > 1:
            trace.state(Operation("*", expression_of(count), old), axis)


@says("repeat_interleave")
def _repeat_interleave(trace: Trace, out: Tensor, x: Tensor, count: Any, dim: int | None = None, **_: Any) -> None:
    if dim is not None and isinstance(count, int):
        old = trace.axes(x)[dim]
        trace.state(
            expression_of(count) if old.size == 1 else Operation("*", old, expression_of(count)), trace.axes(out)[dim]
        )


@says("zeros", "ones", "empty", "rand", "randn", "new_zeros", "new_ones", "new_empty", "full", "new_full")
def _create(trace: Trace, out: Tensor, *sizes: Any, **kwargs: Any) -> None:
    sizes = [size for size in sizes if not isinstance(size, Tensor)] or [kwargs.get("size", ())]
    sizes = sizes[0] if isinstance(sizes[0], list | tuple) else sizes
    _each(trace, sizes, trace.axes(out))


@says("split", "split_with_sizes", "unsafe_split")
def _split(trace: Trace, out: Sequence[Tensor], x: Tensor, sizes: Any = None, dim: int = 0, **kwargs: Any) -> None:
    sizes = kwargs.get("split_size_or_sections", kwargs.get("split_size", kwargs.get("split_sizes", sizes)))
    parts = [trace.axes(part)[dim] for part in out]
    if isinstance(sizes, list | tuple):
        return _each(trace, sizes, parts)
    for part in parts:  # a last one may be smaller
        if part.size == parts[0].size:
            trace.state(expression_of(sizes), part)
    return None


@says("chunk", "tensor_split")
def _chunk(trace: Trace, out: Sequence[Tensor], x: Tensor, parts: Any = None, dim: int = 0, **kwargs: Any) -> None:
    """A number of parts makes them equal; positions say where each begins."""
    parts = kwargs.get("chunks", kwargs.get("sections", kwargs.get("indices", parts)))
    if isinstance(parts, list | tuple):
        for position in parts:
            _slice(trace, trace.axes(x)[dim], None, position)
        return
    for part in out:
        if part.shape[dim] == out[0].shape[dim]:
            trace.state(trace.axes(out[0])[dim], trace.axes(part)[dim])
        else:
            freeze(trace.axes(x)[dim], "its parts are uneven")


@says("narrow")
def _narrow(trace: Trace, out: Tensor, x: Tensor, dim: int, start: int, length: int) -> None:
    trace.state(expression_of(length), trace.axes(out)[dim])
    _slice(trace, trace.axes(x)[dim], start, None)


@says("__getitem__", "__setitem__")
def _getitem(trace: Trace, out: Any, x: Tensor, index: Any, *_: Any) -> None:
    index = index if isinstance(index, tuple) else (index,)
    named, dim = sum(map(_dims_of, index)), 0
    for part in index:
        if isinstance(part, slice) and part.step in (None, 1):
            _slice(trace, trace.axes(x)[dim], part.start, part.stop)
        hold(trace, [part])
        dim += x.ndim - named if part is Ellipsis else _dims_of(part)


def _dims_of(index: Any) -> int:
    """How many dims one part of an index is about."""
    if isinstance(index, Tensor) and index.dtype in (torch.bool, torch.uint8):
        return index.ndim
    return 0 if index is None or index is Ellipsis or isinstance(index, bool) else 1


def _slice(trace: Trace, axis: Axis, start: int | None, stop: int | None) -> None:
    if is_frozen(axis):
        return
    first, last, _ = slice(start, stop).indices(axis.size)
    try:
        parts = cut(axis, [first, last])
    except Conflict:
        return  # the operation itself has met it
    ends = [0, *itertools.accumulate(part.size for part in parts)]
    before = [part for part, end in zip(parts, ends[1:], strict=True) if end <= first]
    inside = [part for part, end in zip(parts, ends, strict=False) if first <= end < last]
    behind = [part for part, end in zip(parts, ends, strict=False) if end >= last]
    for bound, group in (
        (start, before if (start or 0) >= 0 else [*inside, *behind]),
        (stop, [*before, *inside] if (stop or 0) >= 0 else behind),
    ):
        if bound and group:
            total: Expression = group[0]
            for part in group[1:]:
                total = Operation("+", total, part)
            size = expression_of(bound)
            trace.equate(size if bound > 0 else Operation("-", 0, size), total)


@says("conv1d", "conv2d", "conv3d", "convolution", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d")
def _conv(trace: Trace, out: Tensor, x: Tensor, weight: Tensor, *args: Any, **kwargs: Any) -> None:
    groups = kwargs.get("groups", args[4] if len(args) > 4 else 1)
    if int(groups) > 1:
        trace.state(expression_of(groups), trace.groups)


@says("group_norm")
def _group_norm(trace: Trace, out: Tensor, x: Tensor, num_groups: int, *_: Any, **__: Any) -> None:
    if int(num_groups) > 1:
        trace.state(expression_of(num_groups), trace.groups)


@says("layer_norm", "rms_norm")
def _layer_norm(trace: Trace, out: Tensor, x: Tensor, shape: Sequence[int], *_: Any, **__: Any) -> None:
    _each(trace, shape, trace.axes(x)[-len(shape) :])


@says("multi_head_attention_forward")
def _multi_head(
    trace: Trace,
    out: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    width: int,
    heads: int,
    weight: Tensor,
    *_: Any,
    **kwargs: Any,
) -> None:
    """Its own calls are out of sight: heads x dims lie in the projection, and the dims are width // heads."""
    weight = kwargs.get("q_proj_weight") if weight is None else weight
    own = digits(trace.cut(trace.axes(weight)[0], [int(width)])[0])
    trace.state(expression_of(width), trace.axes(query)[-1])
    if int(heads) > 1 and len(own) > 1:
        trace.state(expression_of(heads), own[-2])
    trace.state(Operation("//", expression_of(width), expression_of(heads)), own[-1])


def hold(trace: Trace, args: Any) -> None:
    """Numbers in a call of unknown meaning stay what they are."""
    for arg in args:
        if isinstance(arg, list | tuple):
            hold(trace, arg)
        elif isinstance(arg, Integer) and not isinstance(arg.expression, int):
            trace.equate(arg.expression, int(arg))


def shape_with_axes(trace: Trace, x: Tensor, shape: torch.Size) -> torch.Size:
    """A shape whose entries remember their axes, where something could leave from these."""
    return torch.Size(
        [
            size if size == 1 or is_frozen(axis) else Integer(size, axis, trace.comparisons)
            for size, axis in zip(shape, trace.axes(x), strict=True)
        ]
    )
