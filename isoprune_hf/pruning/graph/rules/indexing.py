"""Rules of operations that select single elements or reorder them."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from isoprune_hf.pruning.graph.axis import freeze, frozen_axis
from isoprune_hf.pruning.graph.rules.registry import RuleTable
from isoprune_hf.pruning.graph.trace import Axes, Trace

rule = RuleTable()
_SELECTED = "single elements are selected"


@rule("select", "unbind", "argmax", "argmin")
def _select(trace: Trace, out: Any, x: Tensor, dim: int | None = 0, *rest: Any) -> Axes | list[Axes]:
    axes = list(trace.axes(x))
    for axis in axes if dim is None else [axes[dim]]:
        freeze(axis, _SELECTED)
    if dim is not None:
        del axes[dim]
    if isinstance(out, Tensor):
        return tuple(axes) if len(axes) == out.ndim else trace.frozen_axes(out, _SELECTED)
    return [tuple(axes)] * len(out)


@rule("roll")
def _roll(trace: Trace, out: Tensor, x: Tensor, shifts: Any, dims: Sequence[int] = ()) -> Axes | list[Axes]:
    return _reorder(trace, out, x, list(dims))


@rule("flip", "cumsum", "cumprod", "sort")
def _reorder(trace: Trace, out: Any, x: Tensor, *args: Any, **kwargs: Any) -> Axes | list[Axes]:
    """Freeze the named dims, or all dims if none is named, because their elements are reordered."""
    dims = args[-1] if args and isinstance(args[-1], list | tuple) else [a for a in args if type(a) is int][:1]
    dims = kwargs.get("dims", kwargs.get("dim", dims))
    axes = trace.axes(x)
    for dim in [dims] if isinstance(dims, int) else dims or range(len(axes)):
        freeze(axes[dim], "its elements are reordered")
    return axes if isinstance(out, Tensor) else [axes] * len(out)


@rule("index")
def _index(trace: Trace, out: Tensor, x: Tensor, indices: Sequence[Tensor | None]) -> Axes | list[Axes]:
    axes = trace.axes(x)
    used = {dim: index for dim, index in enumerate(indices) if index is not None}
    if any(index.dtype in (torch.bool, torch.uint8) and index.ndim > 1 for index in used.values()):
        return trace.freeze_all([x], out, _SELECTED)  # one mask over several dims
    for dim, index in used.items():
        freeze(axes[dim], _SELECTED)
        for axis in trace.axes(index):
            freeze(axis, "its elements are positions")
    kept = [axis for dim, axis in enumerate(axes) if dim not in used]
    first, last = min(used), max(used)
    # As in NumPy: the dims of the indices replace adjacent dims in their place, and come first for all others.
    at = first if last - first == len(used) - 1 else 0
    selected = [frozen_axis(size, _SELECTED) for size in out.shape[at : at + out.ndim - len(kept)]]
    return (*kept[:at], *selected, *kept[at:])


@rule("index_select")
def _index_select(trace: Trace, out: Tensor, x: Tensor, dim: int, _: Tensor) -> Axes:
    axes = list(trace.axes(x))
    freeze(axes[dim], _SELECTED)
    axes[dim] = frozen_axis(out.shape[dim], _SELECTED)
    return tuple(axes)


@rule("embedding")
def _embedding(trace: Trace, out: Tensor, weight: Tensor, indices: Tensor, *_: Any) -> Axes:
    rows, width = trace.axes(weight)
    freeze(rows, _SELECTED)
    return (*trace.axes(indices), width)
