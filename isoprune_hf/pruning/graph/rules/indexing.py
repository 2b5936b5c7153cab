"""Rules of operations that take single elements, make new tensors, or lay windows out; see `layout`."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from isoprune_hf.pruning.graph.axis import Axis, Conflict, freeze, frozen, product, split_digit
from isoprune_hf.pruning.graph.rules.views import rule
from isoprune_hf.pruning.graph.trace import ONE, Axes, Trace


@rule("select", "unbind", "argmax", "argmin")
def _select(trace: Trace, out: Any, x: Tensor, dim: int | None = 0, *rest: Any) -> Axes | list[Axes]:
    axes = list(trace.axes(x))
    for axis in axes if dim is None else [axes[dim]]:
        freeze(axis, "single elements are taken")
    if dim is not None:
        del axes[dim]
    if isinstance(out, Tensor):
        return tuple(axes) if len(axes) == out.ndim else trace.fresh(out, "single elements are taken")
    return [tuple(axes)] * len(out)


@rule("roll")
def _roll(trace: Trace, out: Tensor, x: Tensor, shifts: Any, dims: Sequence[int] = ()) -> Axes:
    return _mixes(trace, out, x, list(dims))


@rule("flip", "cumsum", "cumprod", "sort")
def _mixes(trace: Trace, out: Any, x: Tensor, *args: Any, **kwargs: Any) -> Axes | list[Axes]:
    """Elements of these dims change places; the others pass."""
    dims = args[-1] if args and isinstance(args[-1], list | tuple) else [a for a in args if type(a) is int][:1]
    dims = kwargs.get("dims", kwargs.get("dim", dims))
    axes = trace.axes(x)
    for dim in [dims] if isinstance(dims, int) else dims or range(len(axes)):
        freeze(axes[dim], "its elements change places")
    return axes if isinstance(out, Tensor) else [axes] * len(out)


@rule("index")
def _index(trace: Trace, out: Tensor, x: Tensor, indices: Sequence[Tensor | None]) -> Axes:
    axes = trace.axes(x)
    used = [dim for dim, index in enumerate(indices) if index is not None]
    if any(indices[dim].dtype in (torch.bool, torch.uint8) and indices[dim].ndim > 1 for dim in used):
        return trace.give_up([x], out, "single elements are taken")  # one mask over several dims
    for dim in used:
        freeze(axes[dim], "single elements are taken")
        for axis in trace.axes(indices[dim]):
            freeze(axis, "positions are computed")
    kept = [axis for dim, axis in enumerate(axes) if dim not in used]
    fresh = out.ndim - len(kept)
    at = used[0] if used[-1] - used[0] == len(used) - 1 else 0
    taken = [frozen(size, "single elements are taken") for size in out.shape[at : at + fresh]]
    return (*kept[:at], *taken, *kept[at:])


@rule("index_select")
def _index_select(trace: Trace, out: Tensor, x: Tensor, dim: int, _: Tensor) -> Axes:
    axes = list(trace.axes(x))
    freeze(axes[dim], "single elements are taken")
    axes[dim] = frozen(out.shape[dim], "single elements are taken")
    return tuple(axes)


@rule("embedding")
def _embedding(trace: Trace, out: Tensor, weight: Tensor, indices: Tensor, *_: Any) -> Axes:
    rows, width = trace.axes(weight)
    freeze(rows, "single elements are taken")
    return (*trace.axes(indices), width)


@rule("glu")
def _glu(trace: Trace, out: Tensor, x: Tensor, dim: int = -1) -> Axes:
    axes = list(trace.axes(x))
    axes[dim] = trace.tie(trace.cut(axes[dim], [x.shape[dim] // 2]))
    return tuple(axes)


@rule("zeros", "ones", "full", "empty", "new_zeros", "new_ones", "new_full", "new_empty", "empty_strided")
@rule("new_empty_strided", "scalar_tensor")
def _create(trace: Trace, out: Tensor, *_: Any, **__: Any) -> Axes:
    """Every element is the same, so these may be as wide as what they meet."""
    return tuple(Axis(size) if size != 1 else ONE for size in out.shape)


@rule("arange", "linspace", "logspace", "eye", "rand", "randn", "randint", "randperm", "tril_indices", "triu_indices")
def _count(trace: Trace, out: Tensor, *_: Any, **__: Any) -> Axes:
    """Every element is another number."""
    return trace.fresh(out, "its elements are numbered")


@rule("unfold")
def _unfold(trace: Trace, out: Tensor, x: Tensor, dim: int, *_: Any) -> Axes:
    axes = list(trace.axes(x))
    freeze(axes[dim], "windows over it")
    axes[dim] = frozen(out.shape[dim], "windows over it")
    return (*axes, frozen(out.shape[-1], "windows over it"))


@rule("im2col")
def _im2col(trace: Trace, out: Tensor, x: Tensor, kernel: Sequence[int], *_: Any) -> Axes:
    batch, channels, *sides = trace.axes(x)
    for axis in sides:
        freeze(axis, "windows over it")
    window = frozen(math.prod(kernel), "a window of pixels")
    return batch, product([channels, window]), frozen(out.shape[2], "positions in the image")


@rule("col2im")
def _col2im(trace: Trace, out: Tensor, x: Tensor, size: Sequence[int], kernel: Sequence[int], *_: Any) -> Axes:
    batch, mixed, *positions = trace.axes(x)
    for axis in positions:
        freeze(axis, "positions in the image")
    try:
        channels, window = split_digit(mixed, math.prod(kernel)) if math.prod(kernel) > 1 else (mixed, ONE)
    except Conflict as conflict:
        return trace.give_up([x], out, str(conflict))
    freeze(window, "a window of pixels")
    return batch, channels, *(frozen(side, "positions in the image") for side in out.shape[2:])
