"""Rules of operations that compute: pointwise, products, convolutions, norms, reductions, windows.

See `layout` for what a rule is.
"""

from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any

from torch import Tensor

from isoprune_hf.pruning.graph.axis import Axis, Conflict, freeze, frozen, is_frozen, mark_batch, product, split_digit
from isoprune_hf.pruning.graph.rules.views import RULES, rule
from isoprune_hf.pruning.graph.trace import ONE, Axes, Trace

_PIXELS = "positions in the image"


def broadcast(trace: Trace, tensors: Iterable[Tensor], shape: Sequence[int]) -> Axes:
    """Tie dims that meet; the output takes what has more than one element."""
    rows = [trace.axes(tensor)[::-1] for tensor in tensors]
    result = []
    for at, size in enumerate(reversed(shape)):
        met = [row[at] for row in rows if at < len(row) and row[at].size == size]
        result.append(trace.tie(met) if size > 1 and met else ONE)
    return tuple(result[::-1])


def pointwise(trace: Trace, out: Tensor, *args: Any, **kwargs: Any) -> Axes:
    """Each element of the output comes from the same element of each input."""
    return broadcast(trace, [arg for arg in (*args, *kwargs.values()) if isinstance(arg, Tensor)], out.shape)


RULES.update(
    dict.fromkeys(("copy_", "where", "masked_fill", "_prelu_kernel", "dropout", "hardswish", "hardsigmoid"), pointwise)
)


@rule("addmm", "baddbmm")
def _addmm(trace: Trace, out: Tensor, bias: Tensor, left: Tensor, right: Tensor, **_: Any) -> Axes:
    axes = _matmul(trace, out, left, right)
    rows = trace.axes(bias)
    for axis, other in zip(reversed(axes), reversed(rows), strict=False):
        if axis.size == other.size > 1:
            trace.tie((axis, other))
    return axes


@rule("mm", "bmm")
def _matmul(trace: Trace, out: Tensor, left: Tensor, right: Tensor) -> Axes:
    *batch, rows, inner = trace.axes(left)
    *others, inner_too, columns = trace.axes(right)
    inner = trace.tie((inner, inner_too))
    batch = [trace.tie(pair) for pair in zip(batch, others, strict=True)]
    for axis in batch:
        mark_batch(axis)
    trace.count((left, right), (*batch, rows, inner, columns))
    return (*batch, rows, columns)


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
    _: Any,
    groups: int,
) -> Axes:
    batch, channels, *window = trace.axes(x)
    first, second, *kernel = trace.axes(weight)
    for axis in kernel:
        freeze(axis, _PIXELS)
    sides = len(window)
    stride, padding = (v if len(v) == sides else list(v) * sides for v in (stride, padding))
    spatial = []
    for axis, size, reach, step, pad in zip(window, out.shape[2:], kernel, stride, padding, strict=True):
        if (reach.size, step, pad) != (1, 1, 0):  # a window that is one element passes its axis on
            freeze(axis, _PIXELS)
            axis = frozen(size, _PIXELS)
        spatial.append(axis)
    trace.groups = ONE
    if groups == 1:
        read, made = (first, second) if transposed else (second, first)
        trace.tie((channels, read))
    else:
        made = _convolve_groups(trace, channels, (first, second), groups, transposed=transposed)
    if bias is not None:
        made = trace.tie((made, *trace.axes(bias)))
    # Each element of the weight is used once for every position of the output; transposed, of the input.
    trace.count((x, weight), (batch, first, second, *kernel, *(window if transposed else spatial)))
    return batch, made, *spatial


def _convolve_groups(
    trace: Trace, channels: Axis, weight: tuple[Axis, Axis], groups: int, *, transposed: bool
) -> Axis:
    """Channels = groups x channels of a group, on both sides; the groups stay, unless each is one channel."""
    outer, inner = weight  # (out, in of a group), transposed: (in, out of a group)
    try:
        if channels.size == groups:
            trace.groups = channels
        else:
            trace.groups, per = split_digit(channels, channels.size // groups)
            freeze(trace.groups, "groups of a convolution")
            if not transposed:
                trace.tie((per, inner))
        if transposed:
            trace.tie((outer, channels))
            if channels.size == groups:
                freeze(inner, "outputs of a group")
            return product([trace.groups, inner])
        if outer.size == groups:
            return trace.tie((trace.groups, outer))
        own, made = split_digit(outer, outer.size // groups)
        trace.tie((own, trace.groups))
        if channels.size == groups:
            freeze(made, "outputs of a group")
    except Conflict as conflict:
        for axis in (channels, *weight):
            freeze(axis, f"groups of a convolution ({conflict})")
    return outer


@rule("native_batch_norm", "_native_batch_norm_legit_no_training", "_native_batch_norm_legit", "cudnn_batch_norm")
@rule("_batch_norm_no_update", "batch_norm")
def _batch_norm(trace: Trace, out: Any, x: Tensor, *args: Any) -> list[Axes] | Axes:
    axes = trace.axes(x)
    channels = trace.tie((axes[1], *(trace.axes(arg)[0] for arg in args if isinstance(arg, Tensor) and arg.ndim == 1)))
    if isinstance(out, Tensor):
        return axes
    statistics = (
        (channels,) if list(part.shape) == [channels.size] else trace.fresh(part, "none") for part in out[1:]
    )
    return [axes, *statistics]


@rule("native_layer_norm", "layer_norm", "_fused_rms_norm", "rms_norm")
def _layer_norm(trace: Trace, out: Any, x: Tensor, shape: Sequence[int], *args: Any) -> list[Axes] | Axes:
    axes = trace.axes(x)
    for arg in args:
        if isinstance(arg, Tensor):
            for axis, other in zip(axes[-len(shape) :], trace.axes(arg), strict=True):
                trace.tie((axis, other))
    if isinstance(out, Tensor):
        return axes
    statistics = (*axes[: -len(shape)], *[ONE] * len(shape))
    return [axes, *(statistics if part.ndim == len(axes) else trace.fresh(part, "none") for part in out[1:])]


@rule("native_group_norm", "group_norm")
def _group_norm(trace: Trace, out: Any, x: Tensor, *args: Any) -> list[Axes] | Axes:
    axes, tensors = trace.axes(x), [arg for arg in args if isinstance(arg, Tensor)]
    numbers = [arg for arg in args if type(arg) is int]
    groups = numbers[-1] if numbers else 1
    trace.groups = ONE
    if 1 < groups < axes[1].size:
        try:
            trace.groups, _ = split_digit(axes[1], axes[1].size // groups)
            freeze(trace.groups, "groups of a norm")
        except Conflict as conflict:
            freeze(axes[1], f"groups of a norm ({conflict})")
    elif groups == axes[1].size:
        trace.groups = axes[1]
    trace.tie((axes[1], *(trace.axes(tensor)[0] for tensor in tensors)))
    return trace.outputs(out, axes)


@rule("mean", "sum", "prod", "var", "std", "var_mean", "std_mean", "amax", "amin", "max", "min", "any", "all")
@rule("logsumexp", "nansum", "count_nonzero")
def _reduce(trace: Trace, out: Any, x: Tensor, *args: Any, **kwargs: Any) -> Axes | list[Axes]:
    if args and isinstance(args[0], Tensor):  # the larger of two tensors
        return broadcast(trace, (x, args[0]), out.shape)
    axes = trace.axes(x)
    found = [arg for arg in args if isinstance(arg, list | tuple) or type(arg) is int]
    dims = kwargs.get("dim", found[0] if found else None)
    dims = list(range(x.ndim)) if dims is None or dims == [] else [dims] if isinstance(dims, int) else dims
    gone = {dim % x.ndim for dim in dims} if x.ndim else set()
    first = out if isinstance(out, Tensor) else out[0]
    if first.ndim == x.ndim:
        axes = tuple(ONE if dim in gone else axis for dim, axis in enumerate(axes))
    else:
        axes = tuple(axis for dim, axis in enumerate(axes) if dim not in gone)
    if len(axes) != first.ndim:
        return trace.give_up([x], out, "a reduction over unknown dims")
    return trace.outputs(out, axes)


@rule("linalg_vector_norm", "norm")
def _vector_norm(
    trace: Trace, out: Tensor, x: Tensor, order: Any = 2, dims: Any = None, *_: Any, **__: Any
) -> Axes | list[Axes]:
    return _reduce(trace, out, x, list(range(x.ndim)) if dims is None else dims)


def _window(sides: int, trace: Trace, out: Any, x: Tensor, *args: Any, **__: Any) -> Axes | list[Axes]:
    """All but the last dims pass: of (B, C, H, W) the two sides of the image change."""
    first = out if isinstance(out, Tensor) else out[0]
    axes = list(trace.axes(x))
    for other in args:
        if isinstance(other, Tensor):  # where to sample
            for axis in trace.axes(other):
                freeze(axis, _PIXELS)
    for dim in range(x.ndim - sides, x.ndim):
        if not is_frozen(axes[dim]):
            freeze(axes[dim], "a window moves over it")
        axes[dim] = frozen(first.shape[dim], _PIXELS)
    return trace.outputs(out, tuple(axes))


_WINDOWS = {
    1: "avg_pool1d adaptive_avg_pool1d upsample_nearest1d reflection_pad1d replication_pad1d",
    2: "max_pool2d max_pool2d_with_indices avg_pool2d _adaptive_avg_pool2d adaptive_max_pool2d upsample_nearest2d "
    "upsample_bilinear2d upsample_bicubic2d _upsample_nearest_exact2d _upsample_bilinear2d_aa _upsample_bicubic2d_aa "
    "reflection_pad2d replication_pad2d grid_sampler_2d",
    3: "max_pool3d_with_indices avg_pool3d _adaptive_avg_pool3d",
}
for _sides, _names in _WINDOWS.items():
    RULES.update(dict.fromkeys(_names.split(), partial(_window, _sides)))


@rule("_scaled_dot_product_attention_math", "_scaled_dot_product_flash_attention_for_cpu")
@rule("_scaled_dot_product_efficient_attention", "_scaled_dot_product_flash_attention")
@rule("_scaled_dot_product_fused_attention_overrideable", "_scaled_dot_product_cudnn_attention")
def _attention(trace: Trace, out: Any, query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> list[Axes]:
    *batch, rows, inner = trace.axes(query)
    *others, tokens, inner_too = trace.axes(key)
    *more, tokens_too, width = trace.axes(value)
    inner, tokens = trace.tie((inner, inner_too)), trace.tie((tokens, tokens_too))
    batch = [trace.tie(axes) for axes in zip(batch, others, more, strict=True)]
    for axis in batch:
        mark_batch(axis)
    trace.count((query, key), (*batch, rows, inner, tokens))
    trace.count((query, value), (*batch, rows, tokens, width))
    return [(*batch, rows, width), *(trace.fresh(part, "statistics") for part in out[1:] if isinstance(part, Tensor))]
