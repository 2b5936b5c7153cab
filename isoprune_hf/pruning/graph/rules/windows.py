"""Rules of operations that slide a window over the last dims: pooling, resizing, reflection, unfolding."""

import math
from collections.abc import Sequence
from functools import partial
from typing import Any

from torch import Tensor

from isoprune_hf.pruning.graph.axis import freeze, frozen_axis, is_frozen, product
from isoprune_hf.pruning.graph.rules.convolution import PIXELS
from isoprune_hf.pruning.graph.rules.registry import RuleTable
from isoprune_hf.pruning.graph.trace import ONE, Axes, Trace
from isoprune_hf.pruning.graph.unify import Conflict, split_factor

rule = RuleTable()
_WINDOW = "a window slides over it"


def _slide(sides: int, trace: Trace, out: Any, x: Tensor, *args: Any, **_: Any) -> Axes | list[Axes]:
    """Freeze the last `sides` dims, such as H and W of (B, C, H, W); the other dims pass."""
    first = out if isinstance(out, Tensor) else out[0]
    axes = list(trace.axes(x))
    for arg in args:
        if isinstance(arg, Tensor):  # the positions of grid_sampler
            for axis in trace.axes(arg):
                freeze(axis, PIXELS)
    for dim in range(x.ndim - sides, x.ndim):
        if not is_frozen(axes[dim]):
            freeze(axes[dim], _WINDOW)
        axes[dim] = frozen_axis(first.shape[dim], PIXELS)
    return trace.output_axes(out, tuple(axes))


rule("adaptive_avg_pool1d", "avg_pool1d", "reflection_pad1d", "replication_pad1d", "upsample_nearest1d")(
    partial(_slide, 1)
)
rule(
    "_adaptive_avg_pool2d",
    "_upsample_bicubic2d_aa",
    "_upsample_bilinear2d_aa",
    "_upsample_nearest_exact2d",
    "adaptive_max_pool2d",
    "avg_pool2d",
    "grid_sampler_2d",
    "max_pool2d",
    "max_pool2d_with_indices",
    "reflection_pad2d",
    "replication_pad2d",
    "upsample_bicubic2d",
    "upsample_bilinear2d",
    "upsample_nearest2d",
)(partial(_slide, 2))
rule("_adaptive_avg_pool3d", "avg_pool3d", "max_pool3d_with_indices")(partial(_slide, 3))


@rule("unfold")
def _unfold(trace: Trace, out: Tensor, x: Tensor, dim: int, *_: Any) -> Axes:
    axes = list(trace.axes(x))
    freeze(axes[dim], _WINDOW)
    axes[dim] = frozen_axis(out.shape[dim], _WINDOW)
    return (*axes, frozen_axis(out.shape[-1], _WINDOW))


@rule("im2col")
def _im2col(trace: Trace, out: Tensor, x: Tensor, kernel: Sequence[int], *_: Any) -> Axes:
    batch, channels, *sides = trace.axes(x)
    for axis in sides:
        freeze(axis, _WINDOW)
    window = frozen_axis(math.prod(kernel), "a window of pixels")
    return batch, product([channels, window]), frozen_axis(out.shape[2], PIXELS)


@rule("col2im")
def _col2im(
    trace: Trace, out: Tensor, x: Tensor, size: Sequence[int], kernel: Sequence[int], *_: Any
) -> Axes | list[Axes]:
    batch, mixed, *positions = trace.axes(x)
    for axis in positions:
        freeze(axis, PIXELS)
    try:
        channels, window = split_factor(mixed, math.prod(kernel)) if math.prod(kernel) > 1 else (mixed, ONE)
    except Conflict as conflict:
        return trace.freeze_all([x], out, str(conflict))
    freeze(window, "a window of pixels")
    return batch, channels, *(frozen_axis(side, PIXELS) for side in out.shape[2:])
