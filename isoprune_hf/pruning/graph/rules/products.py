"""Rules of matrix products and attention."""

from typing import Any

from torch import Tensor

from isoprune_hf.pruning.graph.axis import factors, mark_batch
from isoprune_hf.pruning.graph.rules.registry import RuleTable
from isoprune_hf.pruning.graph.trace import Axes, Trace
from isoprune_hf.pruning.graph.traced_int import Operation, expression_of

rule, size_rule = RuleTable(), RuleTable()


@rule("addmm", "baddbmm")
def _addmm(trace: Trace, out: Tensor, bias: Tensor, left: Tensor, right: Tensor, **_: Any) -> Axes:
    axes = _matmul(trace, out, left, right)
    for axis, other in zip(reversed(axes), reversed(trace.axes(bias)), strict=False):
        if axis.size == other.size > 1:
            trace.tie((axis, other))
    return axes


@rule("mm", "bmm")
def _matmul(trace: Trace, out: Tensor, left: Tensor, right: Tensor) -> Axes:
    *left_batch, rows, left_inner = trace.axes(left)
    *right_batch, right_inner, columns = trace.axes(right)
    inner = trace.tie((left_inner, right_inner))
    batch = [trace.tie(pair) for pair in zip(left_batch, right_batch, strict=True)]
    for axis in batch:
        mark_batch(axis)
    trace.add_matrix_product((left, right), (*batch, rows, inner, columns))
    return (*batch, rows, columns)


@rule("_scaled_dot_product_attention_math", "_scaled_dot_product_flash_attention_for_cpu")
@rule("_scaled_dot_product_efficient_attention", "_scaled_dot_product_flash_attention")
@rule("_scaled_dot_product_fused_attention_overrideable", "_scaled_dot_product_cudnn_attention")
def _attention(trace: Trace, out: Any, query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> list[Axes]:
    *query_batch, rows, query_inner = trace.axes(query)
    *key_batch, key_tokens, key_inner = trace.axes(key)
    *value_batch, value_tokens, width = trace.axes(value)
    inner = trace.tie((query_inner, key_inner))
    tokens = trace.tie((key_tokens, value_tokens))
    batch = [trace.tie(axes) for axes in zip(query_batch, key_batch, value_batch, strict=True)]
    for axis in batch:
        mark_batch(axis)
    trace.add_matrix_product((query, key), (*batch, rows, inner, tokens))
    trace.add_matrix_product((query, value), (*batch, rows, tokens, width))
    statistics = [trace.frozen_axes(part, "statistics") for part in out[1:] if isinstance(part, Tensor)]
    return [(*batch, rows, width), *statistics]


@size_rule("multi_head_attention_forward")
def _multi_head_sizes(
    trace: Trace,
    out: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    width: int,
    heads: int,
    weight: Tensor | None,
    *_: Any,
    **kwargs: Any,
) -> None:
    """Read the heads and dims from the projection, because the calls inside are made with plain integers."""
    projection = kwargs["q_proj_weight"] if weight is None else weight
    if weight is None:  # the layer checks that keys and values have the width of the queries
        trace.tie(trace.axes(kwargs[name])[0] for name in ("q_proj_weight", "k_proj_weight", "v_proj_weight"))
    found = factors(trace.split_at(trace.axes(projection)[0], [int(width)])[0])
    trace.equate_size(expression_of(width), trace.axes(query)[-1])
    if int(heads) > 1 and len(found) > 1:
        trace.equate_size(expression_of(heads), found[-2])
    trace.equate_size(Operation("//", expression_of(width), expression_of(heads)), found[-1])
