"""Rules of operations that put tensors together or take contiguous parts: concatenation, padding, splits, slices."""

import itertools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from isoprune_hf.pruning.graph.axis import Axis, concat, freeze, frozen_axis, is_frozen
from isoprune_hf.pruning.graph.rules.registry import RuleTable
from isoprune_hf.pruning.graph.rules.sizes import assume_constant, equate_sizes
from isoprune_hf.pruning.graph.trace import ONE, Axes, Trace
from isoprune_hf.pruning.graph.traced_int import Expression, Operation, expression_of
from isoprune_hf.pruning.graph.unify import Conflict, split_at, split_factor

rule, size_rule = RuleTable(), RuleTable()


@rule("cat")
def _cat(trace: Trace, out: Tensor, tensors: Sequence[Tensor], dim: int = 0) -> Axes:
    rows = [trace.axes(tensor) for tensor in tensors if tensor.ndim == out.ndim]
    dim %= out.ndim
    return tuple(
        concat([row[at] for row in rows if row[at].size]) if at == dim else trace.tie(row[at] for row in rows)
        for at in range(out.ndim)
    )


@rule("stack")
def _stack(trace: Trace, out: Tensor, tensors: Sequence[Tensor], dim: int = 0) -> Axes:
    rows = [trace.axes(tensor) for tensor in tensors]
    axes = [trace.tie(row[at] for row in rows) for at in range(len(rows[0]))]
    axes.insert(dim % out.ndim, frozen_axis(len(rows), "stacked tensors"))
    return tuple(axes)


@rule("constant_pad_nd")
def _pad(trace: Trace, out: Tensor, x: Tensor, pad: Sequence[int], *_: Any) -> Axes:
    axes = list(trace.axes(x))
    for number, (low, high) in enumerate(zip(pad[::2], pad[1::2], strict=True)):
        at = len(axes) - 1 - number  # the padding of the last dim comes first
        if is_frozen(axes[at]) or low < 0 or high < 0:
            freeze(axes[at], "padding")
            axes[at] = frozen_axis(out.shape[at], "padding")
        elif low or high:
            before = [frozen_axis(low, "padding")] if low else []
            after = [frozen_axis(high, "padding")] if high else []
            axes[at] = concat([*before, axes[at], *after])
    return tuple(axes)


@rule("split", "split_with_sizes", "unsafe_split", "unsafe_split_with_sizes", "chunk", "tensor_split")
def _split(trace: Trace, out: Sequence[Tensor], x: Tensor, _: Any, dim: int = 0) -> list[Axes]:
    axes = list(trace.axes(x))
    dim %= x.ndim
    ends = list(itertools.accumulate(part.shape[dim] for part in out))
    return [(*axes[:dim], part, *axes[dim + 1 :]) for part in trace.split_at(axes[dim], ends)]


@rule("slice")
def _slice(
    trace: Trace, out: Tensor, x: Tensor, dim: int = 0, start: int | None = None, end: int | None = None, step: int = 1
) -> Axes | list[Axes]:
    axes = list(trace.axes(x))
    dim %= x.ndim
    axis = axes[dim]
    size = x.shape[dim]
    first, last, _ = slice(start, end, step).indices(size)
    if step == 1:
        if (first, last) != (0, size):
            axes[dim] = trace.split_at(axis, [first, last])[1 if first > 0 else 0] if last > first else ONE
    elif not is_frozen(axis) and size % step == 0 and first < step and last > size - step:
        try:
            axes[dim], inner = split_factor(axis, step)
            freeze(inner, "every other element is selected")
        except Conflict as conflict:
            return trace.freeze_all([x], out, str(conflict))
    else:
        freeze(axis, "single elements are selected")
        axes[dim] = frozen_axis(out.shape[dim], "single elements are selected")
    return tuple(axes)


@rule("glu")
def _glu(trace: Trace, out: Tensor, x: Tensor, dim: int = -1) -> Axes:
    axes = list(trace.axes(x))
    axes[dim] = trace.tie(trace.split_at(axes[dim], [x.shape[dim] // 2]))
    return tuple(axes)


@size_rule("split", "split_with_sizes", "unsafe_split")
def _split_sizes(
    trace: Trace, out: Sequence[Tensor], x: Tensor, sizes: Any = None, dim: int = 0, **kwargs: Any
) -> None:
    sizes = kwargs.get("split_size_or_sections", kwargs.get("split_size", kwargs.get("split_sizes", sizes)))
    parts = [trace.axes(part)[dim] for part in out]
    if isinstance(sizes, list | tuple):
        equate_sizes(trace, sizes, parts)
        return
    for part in parts:  # the last one may be smaller
        if part.size == parts[0].size:
            trace.equate_size(expression_of(sizes), part)


@size_rule("chunk", "tensor_split")
def _chunk_sizes(
    trace: Trace, out: Sequence[Tensor], x: Tensor, parts: Any = None, dim: int = 0, **kwargs: Any
) -> None:
    """Equate the sizes of the parts: a number gives equal parts, positions are the sums of the parts before them."""
    parts = kwargs.get("chunks", kwargs.get("sections", kwargs.get("indices", parts)))
    if isinstance(parts, list | tuple):
        for position in parts:
            _equate_bounds(trace, trace.axes(x)[dim], None, position)
        return
    for part in out:
        if part.shape[dim] == out[0].shape[dim]:
            trace.equate_size(trace.axes(out[0])[dim], trace.axes(part)[dim])
        else:
            freeze(trace.axes(x)[dim], "its chunks are uneven")


@size_rule("narrow")
def _narrow_sizes(trace: Trace, out: Tensor, x: Tensor, dim: int, start: int, length: int) -> None:
    trace.equate_size(expression_of(length), trace.axes(out)[dim])
    _equate_bounds(trace, trace.axes(x)[dim], start, None)


@size_rule("__getitem__", "__setitem__")
def _index_sizes(trace: Trace, out: Any, x: Tensor, index: Any, *_: Any) -> None:
    index = index if isinstance(index, tuple) else (index,)
    indexed = sum(map(_indexed_dims, index))
    dim = 0
    for part in index:
        if isinstance(part, slice) and part.step in (None, 1):
            _equate_bounds(trace, trace.axes(x)[dim], part.start, part.stop)
        assume_constant(trace, [part])
        dim += x.ndim - indexed if part is Ellipsis else _indexed_dims(part)


def _indexed_dims(index: Any) -> int:
    """Return how many dims one entry of an index selects from."""
    if isinstance(index, Tensor) and index.dtype in (torch.bool, torch.uint8):
        return index.ndim
    return 0 if index is None or index is Ellipsis or isinstance(index, bool) else 1


def _equate_bounds(trace: Trace, axis: Axis, start: int | None, stop: int | None) -> None:
    """Record that each bound of a slice is the size of the parts before it, or, if negative, of those after it."""
    if is_frozen(axis):
        return
    first, last, _ = slice(start, stop).indices(axis.size)
    try:
        parts = split_at(axis, [first, last])
    except Conflict:
        return  # the axis rule of the slice froze the axis
    ends = [0, *itertools.accumulate(part.size for part in parts)]
    before = [part for part, end in zip(parts, ends[1:], strict=True) if end <= first]
    inside = [part for part, end in zip(parts, ends, strict=False) if first <= end < last]
    after = [part for part, end in zip(parts, ends, strict=False) if end >= last]
    for bound, measured in (
        (start, before if (start or 0) >= 0 else [*inside, *after]),
        (stop, [*before, *inside] if (stop or 0) >= 0 else after),
    ):
        if bound and measured:
            total: Expression = measured[0]
            for part in measured[1:]:
                total = Operation("+", total, part)
            size = expression_of(bound)
            trace.equate(size if bound > 0 else Operation("-", 0, size), total)
