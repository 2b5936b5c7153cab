"""Rules of convolutions: plain, grouped, depthwise and transposed, of any number of dims."""

from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import Tensor

from isoprune_hf.pruning.graph.axis import Axis, concat, freeze, frozen_axis, is_frozen, leaves, pieces, product
from isoprune_hf.pruning.graph.rules.registry import RuleTable
from isoprune_hf.pruning.graph.trace import ONE, Axes, Slide, Trace
from isoprune_hf.pruning.graph.traced_int import expression_of
from isoprune_hf.pruning.graph.unify import Conflict, split_factor

rule, size_rule = RuleTable(), RuleTable()
PIXELS = "positions in the image"


class _Window(NamedTuple):
    """The settings of a convolution along one dim."""

    width: int
    stride: int
    padding: int
    dilation: int


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
    settings = (_repeated(values, len(spatial)) for values in (stride, padding, dilation))
    windows = [_Window(axis.size, *values) for axis, *values in zip(kernel, *settings, strict=True)]
    out_spatial = [
        _slide(trace, (x, weight), axis, size, window)
        for axis, size, window in zip(spatial, out.shape[2:], windows, strict=True)
    ]
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


def _repeated(values: Sequence[int], count: int) -> Sequence[int]:
    """Return one value for each spatial dim; a single value counts for all of them."""
    return values if len(values) == count else list(values) * count


def _slide(trace: Trace, sides: tuple[Tensor, Tensor], axis: Axis, size: int, window: _Window) -> Axis:
    """Return the axis of the output for a dim that a window slides over.

    A window of one element passes the axis on. So does a window that keeps the length of an axis of channels (ECA),
    because such a layer works for any number of channels; the trace records it. Any other axis is frozen.

    Args:
        trace: The trace.
        sides: The input and the weight of the convolution.
        axis: The axis of the input.
        size: Size of the output.
        window: The window.
    """
    if (window.width, window.stride, window.padding) == (1, 1, 0):
        return axis
    x, weight = sides
    channels = None if trace.is_weight(x) else _centres(axis, window)
    if channels is not None and channels.size == size:
        trace.slides.append(Slide(channels, trace.source(weight).tensors))
        return channels
    freeze(axis, PIXELS)
    return frozen_axis(size, PIXELS)


def _centres(axis: Axis, window: _Window) -> Axis | None:
    """Return the part of an axis of channels that the centre of a window visits; None for any other axis.

    The rest are the margins that the network padded before the convolution, on both sides.
    """
    margin, odd = divmod(window.dilation * (window.width - 1), 2)
    if window.stride != 1 or odd or is_frozen(axis):
        return None
    parts = pieces(axis)
    for end in (0, -1):
        outside = margin - window.padding
        while outside > 0 and len(parts) > 1:
            outside -= parts.pop(end).size
        if outside:
            return None
    inner = [leaf for part in parts for leaf in leaves(part) if leaf.size > 1]
    return None if any(leaf.frozen is not None or leaf.is_copy for leaf in inner) else concat(parts)


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
