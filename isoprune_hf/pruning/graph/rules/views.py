"""Rules of operations that lay elements out anew: what becomes of axes in views, cuts, concatenations and indexing.

A rule takes the trace, the output of an aten operation and its arguments, ties or freezes axes, and returns the axes
of the output: a tuple, or a list of tuples where there are several outputs.
"""

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from isoprune_hf.pruning.graph.axis import (
    Axis,
    Conflict,
    digits,
    freeze,
    frozen,
    is_frozen,
    join,
    product,
    split_digit,
)
from isoprune_hf.pruning.graph.trace import ONE, Axes, Trace

Rule = Callable[..., Axes | list[Axes]]
RULES: dict[str, Rule] = {}


def rule(*names: str) -> Callable[[Rule], Rule]:
    """Register a rule for operations of these names."""

    def register(function: Rule) -> Rule:
        RULES.update(dict.fromkeys(names, function))
        return function

    return register


@rule("alias", "clone", "contiguous", "detach", "lift_fresh", "_to_copy", "zeros_like", "ones_like", "empty_like")
@rule("full_like", "as_strided_", "set_", "fill_", "zero_", "native_dropout", "bernoulli_", "uniform_", "normal_")
@rule("_softmax", "_log_softmax", "softmax", "_safe_softmax")
def _same(trace: Trace, out: Tensor, x: Tensor, *_: Any, **__: Any) -> Axes:
    axes = trace.axes(x)
    if len(axes) != out.ndim or any(axis.size != size for axis, size in zip(axes, out.shape, strict=True)):
        return trace.give_up([x], out, "a new layout of the memory")
    return axes


@rule("view", "_unsafe_view", "_reshape_alias", "reshape")
def regroup(trace: Trace, out: Tensor, x: Tensor, *_: Any) -> Axes:
    """Match runs of dims of equal product; take the output's dims from the tail of each run, splitting digits."""
    given, wanted = list(trace.axes(x)), list(out.shape)
    result: list[Axis] = []
    if x.numel() == 0 or any(isinstance(size, torch.dtype) for size in _[:1]):
        return trace.give_up([x], out, "a view of other elements")
    while given or wanted:
        run, sizes = [given.pop()] if given else [], [wanted.pop()] if wanted else []
        while (have := math.prod(axis.size for axis in run)) != (want := math.prod(sizes)):
            if have < want:
                run.append(given.pop())
            else:
                sizes.append(wanted.pop())
        result += _regroup_run(run[::-1], sizes)
    return tuple(result[::-1])


def _regroup_run(run: Sequence[Axis], sizes: Sequence[int]) -> list[Axis]:
    """Axes of the output's dims, the last one first."""
    if len(sizes) == 1 and len(run) == 1:
        return [run[0]]
    if all(is_frozen(axis) for axis in run):
        return (
            [
                frozen(size, next(digits(axis)[0].frozen for axis in run if axis.size > 1)) if size > 1 else ONE
                for size in sizes
            ]
            if any(axis.size > 1 for axis in run)
            else [ONE] * len(sizes)
        )
    stack, result = [digit for axis in run for digit in digits(axis)], []
    try:
        for size in sizes:
            taken: list[Axis] = []
            while size > 1:
                digit = stack.pop()
                if digit.size > size or size % digit.size:
                    split_digit(digit, math.gcd(digit.size, size) if digit.size < size else size)
                    stack += digits(digit)
                    digit = stack.pop()
                    if size % digit.size:
                        raise Conflict(f"{digit.size} elements do not go into {size}")
                taken.insert(0, digit)
                size //= digit.size
            result.append(product(taken) if taken else ONE)
    except Conflict as conflict:
        for axis in run:
            freeze(axis, f"an uneven view ({conflict})")
        return [frozen(size, f"an uneven view ({conflict})") for size in sizes]
    return result


@rule("t")
def _t(trace: Trace, out: Tensor, x: Tensor) -> Axes:
    return trace.axes(x)[::-1]


@rule("transpose", "swapaxes", "transpose_")
def _transpose(trace: Trace, out: Tensor, x: Tensor, first: int, second: int) -> Axes:
    axes = list(trace.axes(x))
    axes[first], axes[second] = axes[second], axes[first]
    return tuple(axes)


@rule("permute")
def _permute(trace: Trace, out: Tensor, x: Tensor, dims: Sequence[int]) -> Axes:
    axes = trace.axes(x)
    return tuple(axes[dim] for dim in dims)


@rule("unsqueeze", "unsqueeze_")
def _unsqueeze(trace: Trace, out: Tensor, x: Tensor, dim: int) -> Axes:
    axes = list(trace.axes(x))
    axes.insert(dim % out.ndim, ONE)
    return tuple(axes)


@rule("squeeze", "squeeze_")
def _squeeze(trace: Trace, out: Tensor, x: Tensor, dims: int | Sequence[int] | None = None) -> Axes:
    axes = trace.axes(x)
    dims = range(len(axes)) if dims is None else [dims] if isinstance(dims, int) else dims
    gone = {dim % len(axes) for dim in dims}
    return tuple(axis for dim, axis in enumerate(axes) if dim not in gone or axis.size != 1)


@rule("expand", "broadcast_to")
def _expand(trace: Trace, out: Tensor, x: Tensor, *_: Any, **__: Any) -> Axes:
    axes = (ONE,) * (out.ndim - x.ndim) + tuple(trace.axes(x))
    return tuple(
        axis if axis.size == size else Axis(size, is_copy=True) for axis, size in zip(axes, out.shape, strict=True)
    )


@rule("repeat")
def _repeat(trace: Trace, out: Tensor, x: Tensor, repeats: Sequence[int]) -> Axes:
    axes = (ONE,) * (out.ndim - x.ndim) + tuple(trace.axes(x))
    return tuple(
        product([Axis(count, is_copy=True), axis]) if count > 1 else axis
        for count, axis in zip(repeats, axes, strict=True)
    )


@rule("cat")
def _cat(trace: Trace, out: Tensor, tensors: Sequence[Tensor], dim: int = 0) -> Axes:
    tensors = [tensor for tensor in tensors if tensor.ndim == out.ndim]
    rows, dim = [trace.axes(tensor) for tensor in tensors], dim % out.ndim
    return tuple(
        join([row[at] for row in rows if row[at].size]) if at == dim else trace.tie(row[at] for row in rows)
        for at in range(out.ndim)
    )


@rule("stack")
def _stack(trace: Trace, out: Tensor, tensors: Sequence[Tensor], dim: int = 0) -> Axes:
    rows = [trace.axes(tensor) for tensor in tensors]
    axes = [trace.tie(row[at] for row in rows) for at in range(len(rows[0]))]
    axes.insert(dim % out.ndim, frozen(len(rows), "stacked tensors"))
    return tuple(axes)


@rule("constant_pad_nd")
def _pad(trace: Trace, out: Tensor, x: Tensor, pad: Sequence[int], *_: Any) -> Axes:
    axes = list(trace.axes(x))
    for number, (low, high) in enumerate(zip(pad[::2], pad[1::2], strict=True)):
        at = len(axes) - 1 - number
        if is_frozen(axes[at]) or low < 0 or high < 0:
            freeze(axes[at], "padding")
            axes[at] = frozen(out.shape[at], "padding")
        elif low or high:
            axes[at] = join(
                [frozen(size, "padding") for size in [low] if size]
                + [axes[at]]
                + [frozen(size, "padding") for size in [high] if size]
            )
    return tuple(axes)


@rule("split", "split_with_sizes", "unsafe_split", "unsafe_split_with_sizes", "chunk", "tensor_split")
def _split(trace: Trace, out: Sequence[Tensor], x: Tensor, _: Any, dim: int = 0) -> list[Axes]:
    axes, dim = list(trace.axes(x)), dim % x.ndim
    ends = list(itertools.accumulate(part.shape[dim] for part in out))
    parts = trace.cut(axes[dim], ends)
    return [(*axes[:dim], part, *axes[dim + 1 :]) for part in parts]


@rule("slice")
def _slice(
    trace: Trace, out: Tensor, x: Tensor, dim: int = 0, start: int | None = None, end: int | None = None, step: int = 1
) -> Axes:
    axes, dim = list(trace.axes(x)), dim % x.ndim
    axis, size = axes[dim], x.shape[dim]
    first, last, _ = slice(start, end, step).indices(size)
    if step == 1:
        at = 1 if first > 0 else 0
        axes[dim] = axis if (first, last) == (0, size) else trace.cut(axis, [first, last])[at] if last > first else ONE
    elif not is_frozen(axis) and size % step == 0 and first < step and last > size - step:
        try:
            axes[dim], inner = split_digit(axis, step)
            freeze(inner, "every other element is taken")
        except Conflict as conflict:
            return trace.give_up([x], out, str(conflict))
    else:
        freeze(axis, "single elements are taken")
        axes[dim] = frozen(out.shape[dim], "single elements are taken")
    return tuple(axes)
