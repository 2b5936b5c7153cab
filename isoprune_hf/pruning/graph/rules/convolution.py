"""Rules of convolutions: plain, grouped, depthwise and transposed, of any number of dims."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from isoprune_hf.pruning.graph.axis import Axis, freeze, frozen_axis, product
from isoprune_hf.pruning.graph.rules.registry import RuleTable
from isoprune_hf.pruning.graph.trace import ONE, Axes, Trace
from isoprune_hf.pruning.graph.traced_int import expression_of
from isoprune_hf.pruning.graph.unify import Conflict, split_factor

rule, size_rule = RuleTable(), RuleTable()
PIXELS = "positions in the image"


@rule("convolution")
def _convolution(
    trace: Trace,
    out: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    transposed: bool,
    output_padding: Any,
    groups: int,
) -> Axes:
    batch, channels, *spatial = trace.axes(x)
    first, second, *kernel = trace.axes(weight)
    for axis in kernel:
        freeze(axis, PIXELS)
    out_spatial = _spatial_axes(spatial, out.shape[2:], kernel, stride, padding)
    trace.group_axis = ONE
    if groups == 1:
        read, written = (first, second) if transposed else (second, first)
        trace.tie((channels, read))
    else:
        written = _convolve_groups(trace, channels, (first, second), groups, transposed=transposed)
    if bias is not None:
        written = trace.tie((written, *trace.axes(bias)))
    # Each element of the weight is used once for every position of the output; transposed, of the input.
    trace.add_matrix_product((x, weight), (batch, first, second, *kernel, *(spatial if transposed else out_spatial)))
    return batch, written, *out_spatial


def _spatial_axes(
    spatial: Sequence[Axis],
    sizes: Sequence[int],
    kernel: Sequence[Axis],
    stride: Sequence[int],
    padding: Sequence[int],
) -> list[Axis]:
    """Return the spatial axes of the output; a window of one element passes the axis of the input on."""
    count = len(spatial)
    stride, padding = (values if len(values) == count else list(values) * count for values in (stride, padding))
    result = []
    for axis, size, width, step, pad in zip(spatial, sizes, kernel, stride, padding, strict=True):
        if (width.size, step, pad) != (1, 1, 0):
            freeze(axis, PIXELS)
            axis = frozen_axis(size, PIXELS)
        result.append(axis)
    return result


def _convolve_groups(
    trace: Trace, channels: Axis, weight: tuple[Axis, Axis], groups: int, *, transposed: bool
) -> Axis:
    """Tie the channels of a grouped convolution and return the channels of its output.

    On both sides, channels = groups x channels of a group. The groups are frozen unless each is a single channel.

    Args:
        trace: The trace.
        channels: Channels of the input.
        weight: Axes 0 and 1 of the weight: (out, in of a group); transposed: (in, out of a group).
        groups: Number of groups.
        transposed: The convolution is transposed.
    """
    outer, inner = weight
    try:
        if channels.size == groups:
            trace.group_axis = channels
        else:
            trace.group_axis, in_group = split_factor(channels, channels.size // groups)
            freeze(trace.group_axis, "groups of a convolution")
            if not transposed:
                trace.tie((in_group, inner))
        if transposed:
            trace.tie((outer, channels))
            if channels.size == groups:
                freeze(inner, "outputs of a group")
            return product([trace.group_axis, inner])
        if outer.size == groups:
            return trace.tie((trace.group_axis, outer))
        out_groups, written = split_factor(outer, outer.size // groups)
        trace.tie((out_groups, trace.group_axis))
        if channels.size == groups:
            freeze(written, "outputs of a group")
    except Conflict as conflict:
        for axis in (channels, *weight):
            freeze(axis, f"groups of a convolution ({conflict})")
    return outer


@size_rule("conv1d", "conv2d", "conv3d", "convolution", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d")
def _group_sizes(trace: Trace, out: Tensor, x: Tensor, weight: Tensor, *args: Any, **kwargs: Any) -> None:
    groups = kwargs.get("groups", args[4] if len(args) > 4 else 1)
    if int(groups) > 1:
        trace.equate_size(expression_of(groups), trace.group_axis)
