"""Rules of views: operations that keep all elements and regroup, permute or repeat dims."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from isoprune_hf.pruning.graph.axis import Axis, factors, freeze, frozen_axis, is_frozen, product, reason_of
from isoprune_hf.pruning.graph.rules.registry import RuleTable
from isoprune_hf.pruning.graph.rules.sizes import equate_sizes, flat_sizes
from isoprune_hf.pruning.graph.trace import ONE, Axes, Trace
from isoprune_hf.pruning.graph.traced_int import Operation, expression_of
from isoprune_hf.pruning.graph.unify import Conflict, split_factor

rule, size_rule = RuleTable(), RuleTable()


@rule("alias", "clone", "contiguous", "detach", "lift_fresh", "_to_copy", "zeros_like", "ones_like", "empty_like")
@rule("full_like", "as_strided_", "set_", "fill_", "zero_", "native_dropout", "bernoulli_", "uniform_", "normal_")
@rule("_softmax", "_log_softmax", "softmax", "_safe_softmax")
def _keep_shape(trace: Trace, out: Tensor, x: Tensor, *_: Any, **__: Any) -> Axes | list[Axes]:
    axes = trace.axes(x)
    if len(axes) != out.ndim or any(axis.size != size for axis, size in zip(axes, out.shape, strict=True)):
        return trace.freeze_all([x], out, "a new memory layout")
    return axes


@rule("view", "_unsafe_view", "_reshape_alias", "reshape")
def regroup(trace: Trace, out: Tensor, x: Tensor, *args: Any) -> Axes | list[Axes]:
    """Return the axes of a view: factors of the input's dims, composed into the output's dims.

    Runs of input dims are matched with runs of output dims of the same number of elements, from the last dim on.
    """
    if x.numel() == 0 or any(isinstance(arg, torch.dtype) for arg in args[:1]):
        return trace.freeze_all([x], out, "a view as another dtype")
    given = list(trace.axes(x))
    wanted = list(out.shape)
    result: list[Axis] = []
    while given or wanted:
        run = [given.pop()] if given else []
        sizes = [wanted.pop()] if wanted else []
        while (have := math.prod(axis.size for axis in run)) != (want := math.prod(sizes)):
            if have < want:
                run.append(given.pop())
            else:
                sizes.append(wanted.pop())
        result += _regroup_run(run[::-1], sizes)
    return tuple(result[::-1])


def _regroup_run(run: Sequence[Axis], sizes: Sequence[int]) -> list[Axis]:
    """Return the axes of the output dims of a run.

    Args:
        run: Axes of the input dims, the first dim first.
        sizes: Sizes of the output dims, the last dim first; the result has the same order.
    """
    if len(sizes) == 1 and len(run) == 1:
        return [run[0]]
    if all(is_frozen(axis) for axis in run):
        reason = next((reason_of(factors(axis)[0]) for axis in run if axis.size > 1), "one element")
        return [frozen_axis(size, reason) if size > 1 else ONE for size in sizes]
    stack = [factor for axis in run for factor in factors(axis)]
    result = []
    try:
        for size in sizes:
            taken = _take_factors(stack, size)
            result.append(product(taken) if taken else ONE)
    except Conflict as conflict:
        for axis in run:
            freeze(axis, f"an uneven view ({conflict})")
        return [frozen_axis(size, f"an uneven view ({conflict})") for size in sizes]
    return result


def _take_factors(stack: list[Axis], size: int) -> list[Axis]:
    """Remove, in place, the innermost factors of `size` elements together from a stack; splits a factor if needed.

    Raises:
        Conflict: There are no such factors.
    """
    taken: list[Axis] = []
    while size > 1:
        factor = stack.pop()
        if factor.size > size or size % factor.size:
            split_factor(factor, math.gcd(factor.size, size) if factor.size < size else size)
            stack += factors(factor)
            factor = stack.pop()
            if size % factor.size:
                raise Conflict(f"{factor.size} elements do not divide {size}")
        taken.insert(0, factor)
        size //= factor.size
    return taken


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
    removed = {dim % len(axes) for dim in dims}
    return tuple(axis for dim, axis in enumerate(axes) if dim not in removed or axis.size != 1)


@rule("expand", "broadcast_to")
def _expand(trace: Trace, out: Tensor, x: Tensor, *_: Any, **__: Any) -> Axes:
    axes = (ONE,) * (out.ndim - x.ndim) + trace.axes(x)
    return tuple(
        axis if axis.size == size else Axis(size, is_copy=True) for axis, size in zip(axes, out.shape, strict=True)
    )


@rule("repeat")
def _repeat(trace: Trace, out: Tensor, x: Tensor, repeats: Sequence[int]) -> Axes:
    axes = (ONE,) * (out.ndim - x.ndim) + trace.axes(x)
    return tuple(
        product([Axis(count, is_copy=True), axis]) if count > 1 else axis
        for count, axis in zip(repeats, axes, strict=True)
    )


@size_rule("view", "reshape", "expand", "broadcast_to")
def _view_sizes(trace: Trace, out: Tensor, x: Tensor, *args: Any, **kwargs: Any) -> None:
    sizes = flat_sizes(args or (kwargs.get("shape", kwargs.get("size", ())),))
    if all(isinstance(size, int) for size in sizes):
        equate_sizes(trace, sizes, trace.axes(out)[out.ndim - len(sizes) :])


@size_rule("unflatten")
def _unflatten_sizes(trace: Trace, out: Tensor, x: Tensor, dim: int, sizes: Sequence[int]) -> None:
    equate_sizes(trace, sizes, trace.axes(out)[dim % x.ndim :])


@size_rule("view_as", "reshape_as", "expand_as")
def _view_as_sizes(trace: Trace, out: Tensor, x: Tensor, other: Tensor) -> None:
    for axis, wanted in zip(trace.axes(out), trace.axes(other), strict=True):
        trace.equate_size(wanted, axis)


@size_rule("repeat")
def _repeat_sizes(trace: Trace, out: Tensor, x: Tensor, *args: Any) -> None:
    counts = flat_sizes(args)
    given = [None] * (len(counts) - x.ndim) + list(trace.axes(x))
    for count, axis, old in zip(counts, trace.axes(out), given, strict=True):
        if old is None or old.size == 1:
            trace.equate_size(expression_of(count), axis)
        elif int(count) > 1:
            trace.equate_size(Operation("*", expression_of(count), old), axis)


@size_rule("repeat_interleave")
def _repeat_interleave_sizes(
    trace: Trace, out: Tensor, x: Tensor, count: Any, dim: int | None = None, **_: Any
) -> None:
    if dim is not None and isinstance(count, int):
        old = trace.axes(x)[dim]
        size = expression_of(count) if old.size == 1 else Operation("*", old, expression_of(count))
        trace.equate_size(size, trace.axes(out)[dim])
