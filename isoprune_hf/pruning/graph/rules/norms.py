"""Rules of normalisation layers."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from isoprune_hf.pruning.graph.axis import freeze
from isoprune_hf.pruning.graph.rules.registry import RuleTable
from isoprune_hf.pruning.graph.rules.sizes import equate_sizes
from isoprune_hf.pruning.graph.trace import ONE, Axes, Trace
from isoprune_hf.pruning.graph.traced_int import expression_of
from isoprune_hf.pruning.graph.unify import Conflict, split_factor

rule, size_rule = RuleTable(), RuleTable()
_UNUSED = "an output that is not used"


@rule("native_batch_norm", "_native_batch_norm_legit_no_training", "_native_batch_norm_legit", "cudnn_batch_norm")
@rule("_batch_norm_no_update", "batch_norm")
def _batch_norm(trace: Trace, out: Any, x: Tensor, *args: Any) -> list[Axes] | Axes:
    axes = trace.axes(x)
    vectors = [arg for arg in args if isinstance(arg, Tensor) and arg.ndim == 1]
    channels = trace.tie((axes[1], *(trace.axes(vector)[0] for vector in vectors)))
    if isinstance(out, Tensor):
        return axes
    statistics = (
        (channels,) if list(part.shape) == [channels.size] else trace.frozen_axes(part, _UNUSED) for part in out[1:]
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
    return [axes, *(statistics if part.ndim == len(axes) else trace.frozen_axes(part, _UNUSED) for part in out[1:])]


@rule("native_group_norm", "group_norm")
def _group_norm(trace: Trace, out: Any, x: Tensor, *args: Any) -> list[Axes] | Axes:
    axes = trace.axes(x)
    tensors = [arg for arg in args if isinstance(arg, Tensor)]
    numbers = [arg for arg in args if type(arg) is int]
    groups = numbers[-1] if numbers else 1
    trace.group_axis = ONE
    if 1 < groups < axes[1].size:
        try:
            trace.group_axis, _ = split_factor(axes[1], axes[1].size // groups)
            freeze(trace.group_axis, "groups of a norm")
        except Conflict as conflict:
            freeze(axes[1], f"groups of a norm ({conflict})")
    elif groups == axes[1].size:
        trace.group_axis = axes[1]
    trace.tie((axes[1], *(trace.axes(tensor)[0] for tensor in tensors)))
    if isinstance(out, Tensor):
        return axes
    # One mean and one deviation for each group: if every channel is a group, there are as many as channels.
    statistics = axes[0], trace.group_axis
    counts = [axis.size for axis in statistics]
    return [
        axes,
        *(statistics if list(part.shape) == counts else trace.frozen_axes(part, _UNUSED) for part in out[1:]),
    ]


@size_rule("group_norm")
def _group_norm_sizes(trace: Trace, out: Tensor, x: Tensor, num_groups: int, *_: Any, **__: Any) -> None:
    if int(num_groups) > 1:
        trace.equate_size(expression_of(num_groups), trace.group_axis)


@size_rule("layer_norm", "rms_norm")
def _layer_norm_sizes(trace: Trace, out: Tensor, x: Tensor, shape: Sequence[int], *_: Any, **__: Any) -> None:
    equate_sizes(trace, shape, trace.axes(x)[-len(shape) :])
