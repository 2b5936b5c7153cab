from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers.axis_notation import Function, reasons, solve, spell, trace_function
from torch import Tensor, nn
from torch.nn import functional as F

from isoprune_hf.pruning.graph.axis import find, leaves
from isoprune_hf.pruning.graph.trace import Trace
from isoprune_hf.pruning.graph.tracer import trace_network

PIXELS = "positions in the image"
IMAGE = (1, 8, 5, 5)
FOLLOWED: dict[str, tuple[Callable[[Any], Tensor], dict[str, Any], str]] = {
    "a sum": (lambda m: m.a + m.b, {"a": (4, 6), "b": (6,)}, "A B, B"),
    "a sum over ones": (lambda m: m.a + m.b, {"a": (4, 1), "b": (6,)}, "A 1, B"),
    "a condition": (lambda m: torch.where(m.a > 0, m.b, m.c), {"a": (4, 1), "b": (6,), "c": (4, 6)}, "A 1, B, A B"),
    "a mask": (lambda m: m.a.masked_fill(m.b > 0, 0), {"a": (4, 6), "b": (6,)}, "A B, B"),
    "a copy into a part": (lambda m: _copied(m), {"a": (4, 6), "b": (6,)}, "A B, B"),
    "three factors": (lambda m: torch.addcmul(m.a, m.b, m.c), {"a": (4, 6), "b": (6,), "c": (4, 1)}, "A B, B, A 1"),
    "a softmax": (lambda m: m.a.softmax(-1) + m.b, {"a": (4, 6), "b": (6,)}, "A B, B"),
    "a product": (lambda m: m.a @ m.b, {"a": (4, 6), "b": (6, 5)}, "A B, B C"),
    "a product's outputs": (lambda m: m.a @ m.b + m.c, {"a": (4, 6), "b": (6, 5), "c": (4, 5)}, "A B, B C, A C"),
    "products of a batch": (lambda m: m.a @ m.b, {"a": (2, 4, 6), "b": (2, 6, 5)}, "A B C, A C D"),
    "a product that is broadcast": (lambda m: m.a @ m.b, {"a": (2, 4, 6), "b": (6, 5)}, "A B C, C D"),
    "a linear layer": (lambda m: F.linear(m.x, m.w, m.b), {"x": (2, 6), "w": (4, 6), "b": (4,)}, "A, A B, C B"),
    "baddbmm": (
        lambda m: torch.baddbmm(m.c, m.a, m.b),
        {"a": (2, 4, 6), "b": (2, 6, 5), "c": (2, 4, 5)},
        "A B C, A C D, A B D",
    ),
    "einsum": (
        lambda m: torch.einsum("bhid,bhjd->bhij", m.a, m.b),
        {"a": (2, 3, 4, 6), "b": (2, 3, 5, 6)},
        "A B C D, A B E D",
    ),
    "a convolution": (
        lambda m: F.conv2d(m.x, m.w, m.b),
        {"b": (6,), "w": (6, 8, 3, 3), "x": IMAGE},
        "A, A B 3! 3!, 1 B 5! 5!",
    ),
    "a convolution of one pixel": (
        lambda m: F.conv2d(m.x, m.w),
        {"w": (6, 8, 1, 1), "x": IMAGE},
        "A B 1 1, 1 B C D",
    ),
    "one pixel with a stride": (
        lambda m: F.conv2d(m.x, m.w, stride=2),
        {"w": (6, 8, 1, 1), "x": IMAGE},
        "A B 1 1, 1 B 5! 5!",
    ),
    "one pixel over channels that lie last": (
        lambda m: F.conv1d(m.x, m.w),
        {"w": (6, 4, 1), "x": (1, 4, 8)},
        "A B 1, 1 B C",
    ),
    "a window over channels": (
        lambda m: F.conv1d(m.x, m.w, padding=1),
        {"w": (1, 1, 3), "x": (1, 1, 8)},
        "1 1 3!, 1 1 8!",
    ),
    "grouped": (
        lambda m: F.conv2d(m.x, m.w, m.b, groups=2),
        {"b": (12,), "w": (12, 4, 3, 3), "x": IMAGE},
        "(2!*A), (2!*A) B 3! 3!, 1 (2!*B) 5! 5!",
    ),
    "depthwise": (
        lambda m: F.conv2d(m.x, m.w, groups=m.n),
        {"w": (8, 1, 3, 3), "x": IMAGE, "n": 8},
        "A 1 3! 3!, 1 A 5! 5!",
    ),
    "depthwise by a literal": (
        lambda m: F.conv2d(m.x, m.w, groups=8),
        {"w": (8, 1, 3, 3), "x": IMAGE},
        "8! 1 3! 3!, 1 8! 5! 5!",
    ),
    "depthwise with several outputs": (
        lambda m: F.conv2d(m.x, m.w, groups=m.n),
        {"w": (16, 1, 3, 3), "x": IMAGE, "n": 8},
        "(A*2!) 1 3! 3!, 1 A 5! 5!",
    ),
    "transposed": (
        lambda m: F.conv_transpose2d(m.x, m.w, m.b),
        {"b": (6,), "w": (8, 6, 2, 2), "x": IMAGE},
        "A, B A 2! 2!, 1 B 5! 5!",
    ),
    "transposed and grouped": (
        lambda m: F.conv_transpose2d(m.x, m.w, m.b, groups=2),
        {"b": (12,), "w": (8, 6, 2, 2), "x": IMAGE},
        "(2!*A), (2!*B) A 2! 2!, 1 (2!*B) 5! 5!",
    ),
    "transposed and depthwise": (
        lambda m: F.conv_transpose2d(m.x, m.w, groups=m.n),
        {"w": (8, 1, 2, 2), "x": IMAGE, "n": 8},
        "A 1 2! 2!, 1 A 5! 5!",
    ),
    "a batch norm": (
        lambda m: F.batch_norm(m.x, m.mean, m.var, m.w, m.b),
        {"b": (8,), "mean": (8,), "var": (8,), "w": (8,), "x": IMAGE},
        "A, A, A, A, 1 A B C",
    ),
    "a layer norm": (
        lambda m: F.layer_norm(m.x, m.w.shape, m.w, m.b),
        {"b": (8,), "w": (8,), "x": (4, 8)},
        "A, A, B A",
    ),
    "a layer norm over two dims": (
        lambda m: F.layer_norm(m.x, m.w.shape, m.w),
        {"w": (6, 8), "x": (4, 6, 8)},
        "A B, C A B",
    ),
    "a layer norm without weights": (lambda m: F.layer_norm(m.x, m.x.shape[-1:]), {"x": (4, 8)}, "A B"),
    "an rms norm": (lambda m: F.rms_norm(m.x, m.w.shape, m.w), {"w": (8,), "x": (4, 8)}, "A, B A"),
    "a group norm": (
        lambda m: F.group_norm(m.x, 2, m.w, m.b),
        {"b": (8,), "w": (8,), "x": IMAGE},
        "(2!*A), (2!*A), 1 (2!*A) B C",
    ),
    "a group norm of one group": (
        lambda m: F.group_norm(m.x, 1, m.w, m.b),
        {"b": (8,), "w": (8,), "x": IMAGE},
        "A, A, 1 A B C",
    ),
    "a group norm of one channel a group": (
        lambda m: F.group_norm(m.x, m.n, m.w, m.b),
        {"b": (8,), "w": (8,), "x": IMAGE, "n": 8},
        "A, A, 1 A B C",
    ),
    "fused attention": (
        lambda m: F.scaled_dot_product_attention(m.k, m.q, m.v) + m.y,
        {"k": (1, 2, 4, 6), "q": (1, 2, 3, 6), "v": (1, 2, 3, 5), "y": (4, 5)},
        "1 A B C, 1 A D C, 1 A D E, B E",
    ),
    "pooled": (lambda m: F.max_pool2d(m.x, 2) + m.y, {"x": (1, 8, 4, 4), "y": (8, 1, 1)}, "1 A 4! 4!, A 1 1"),
    "pooled by means": (lambda m: F.avg_pool2d(m.x, 2), {"x": IMAGE}, "1 A 5! 5!"),
    "pooled to one pixel": (
        lambda m: F.adaptive_avg_pool2d(m.x, 1) + m.y,
        {"x": IMAGE, "y": (8, 1, 1)},
        "1 A B C, A 1 1",
    ),
    "pooled to two pixels": (lambda m: F.adaptive_avg_pool2d(m.x, 2), {"x": IMAGE}, "1 A 5! 5!"),
    "pooled without a batch": (lambda m: F.max_pool2d(m.x, (3, 1), 1, (1, 0)), {"x": (4, 6, 5)}, "A 6! 5!"),
    "pooled without a batch, by means": (lambda m: F.avg_pool1d(m.x, 3, 1, 1), {"x": (4, 6)}, "A 6!"),
    "resized": (lambda m: F.interpolate(m.x, scale_factor=2), {"x": IMAGE}, "1 A 5! 5!"),
    "resized smoothly": (lambda m: F.interpolate(m.x, size=(7, 7), mode="bicubic"), {"x": IMAGE}, "1 A 5! 5!"),
    "mirrored": (lambda m: F.pad(m.x, (1, 1, 1, 1), mode="reflect"), {"x": IMAGE}, "1 A 5! 5!"),
    "sampled at positions": (
        lambda m: F.grid_sample(m.x, m.y, align_corners=False),
        {"x": IMAGE, "y": (1, 3, 4, 2)},
        "1 A 5! 5!, 1 3! 4! 2!",
    ),
    "the larger of two": (lambda m: torch.maximum(m.a, m.b), {"a": (4, 6), "b": (6,)}, "A B, B"),
    "the larger of two, by max": (lambda m: torch.max(m.a, m.b), {"a": (4, 6), "b": (6,)}, "A B, B"),
}


def _copied(m: Any) -> Tensor:
    table = torch.empty_like(m.a)
    table.copy_(m.b)
    return table


@pytest.mark.parametrize("name", FOLLOWED)
def test_operations_tie_the_expected_axes(name: str) -> None:
    function, values, expected = FOLLOWED[name]
    trace = trace_function(function, **values)
    solve(trace, **values)
    assert spell(trace) == expected
    assert not trace.unknown


# What is done with (3, 4, 5) -> the dims that are left.
REDUCED: dict[str, tuple[Callable[[Tensor], Tensor], tuple[int | None, ...]]] = {
    "mean of one": (lambda x: x.mean(1), (0, 2)),
    "mean from behind": (lambda x: x.mean(-1), (0, 1)),
    "mean of two": (lambda x: x.mean((0, 2)), (1,)),
    "mean by name": (lambda x: torch.mean(x, dim=2), (0, 1)),
    "mean that stays": (lambda x: x.mean(1, keepdim=True), (0, None, 2)),
    "sum of all": (lambda x: x.sum(), ()),
    "sum of two from behind": (lambda x: x.sum((-1, -2)), (0,)),
    "product": (lambda x: x.prod(0), (1, 2)),
    "variance": (lambda x: x.var(1), (0, 2)),
    "variance that stays": (lambda x: x.var(dim=(1, 2), keepdim=True, unbiased=False), (0, None, None)),
    "deviation": (lambda x: x.std(2), (0, 1)),
    "variance and mean": (lambda x: torch.var_mean(x, 1)[1], (0, 2)),
    "largest": (lambda x: x.amax(1), (0, 2)),
    "largest of all": (lambda x: x.amax(), ()),
    "largest and where": (lambda x: x.max(0)[0], (1, 2)),
    "largest, one number": (lambda x: x.max(), ()),
    "log of a sum": (lambda x: x.logsumexp(1), (0, 2)),
    "norm": (lambda x: torch.linalg.vector_norm(x, dim=1), (0, 2)),
    "norm that stays": (lambda x: x.norm(dim=-1, keepdim=True), (0, 1, None)),
    "norm of all": (lambda x: torch.linalg.vector_norm(x), ()),
}


@pytest.mark.parametrize("name", REDUCED)
def test_reduction_keeps_other_dims(name: str) -> None:
    reduce, dims = REDUCED[name]
    shape = (3, 4, 5)
    kept = tuple(1 if dim is None else shape[dim] for dim in dims)
    # Tied to what is left, the other tensor has its letters.
    trace = trace_function(lambda m: reduce(m.a) + m.b, a=shape, b=kept)
    assert spell(trace) == "A B C, " + " ".join("1" if dim is None else "ABC"[dim] for dim in dims)
    assert not trace.unknown


def test_frozen_axes_have_reasons() -> None:
    x = {"x": IMAGE}
    assert reasons(trace_function(lambda m: F.max_pool2d(m.x, 2), **x)) == {"a window slides over it"}
    assert reasons(trace_function(lambda m: F.conv2d(m.x, m.w), w=(6, 8, 3, 3), **x)) == {PIXELS}
    grouped = trace_function(lambda m: F.conv2d(m.x, m.w, groups=2), w=(12, 4, 1, 1), **x)
    assert reasons(grouped) == {"groups of a convolution"}
    multiplied = trace_function(lambda m: F.conv2d(m.x, m.w, groups=8), w=(16, 1, 1, 1), **x)
    assert "outputs of a group" in reasons(multiplied)
    assert reasons(trace_function(lambda m: F.group_norm(m.x, 2), **x)) == {"groups of a norm"}
    uneven = trace_function(lambda m: F.group_norm(torch.cat([m.a, m.b], 1), 2), a=(1, 3, 4), b=(1, 5, 4))
    assert reasons(uneven) == {"groups of a norm (a split at [3] lies inside a factor)"}


def test_operation_without_rule_freezes_its_axes() -> None:
    trace = trace_function(lambda m: torch.linalg.inv_ex(m.a)[0] + m.b, a=(4, 4), b=(4, 4))
    assert spell(trace) == "4! 4!, 4! 4!"
    assert trace.unknown == {"linalg_inv_ex": 1}
    assert reasons(trace) == {"there is no rule for the operation linalg_inv_ex"}


def test_batch_dim_of_activation_product_is_marked() -> None:
    trace = trace_function(lambda m: m.a @ m.b, a=(2, 4, 6), b=(2, 6, 5))
    head, *others = [find(axis) for axis in trace.tensors["a"]]
    assert head.is_batch and not any(axis.is_batch for axis in others)


def test_matrix_products_record_their_sizes() -> None:
    trace = trace_function(
        lambda m: F.conv2d(m.x, m.w, groups=2) + m.a @ m.b, x=IMAGE, w=(12, 4, 3, 3), a=(3, 7), b=(7, 3)
    )
    sizes = [torch.Size([axis.size for axis in product.sizes]).numel() for product in trace.matrix_products]
    assert sorted(sizes) == sorted([12 * 4 * 9 * 9, 3 * 7 * 3])
    assert all(product.has_weight for product in trace.matrix_products)


def trace_module(module: nn.Module, forward: Callable[[Any], Tensor], **values: Any) -> Trace:
    with torch.device("meta"):
        network = Function(forward, **values)
        network.layer = module
    return trace_network(network.eval().to("meta"), torch.zeros(1, 3, 4, 4, device="meta"))


def test_torch_attention_has_heads_and_dims() -> None:
    attention = nn.MultiheadAttention(8, 2, batch_first=True)
    trace = trace_module(attention, lambda m: m.layer(m.x, m.x, m.x, need_weights=False)[0], x=(1, 5, 8))
    assert spell(trace) == "(3!*(A*B)), (3!*(A*B)) C, D, D (A*B), 1 E C"
    head, dim = leaves(trace.tensors["layer.out_proj.weight"][1])
    assert (head.size, dim.size, head.is_batch, dim.is_batch) == (2, 4, True, False)


def test_recurrent_layer_ties_its_gates() -> None:
    trace = trace_module(nn.LSTM(8, 6, batch_first=True), lambda m: m.layer(m.x)[0], x=(1, 3, 8))
    gates = spell(trace, "layer.weight_ih_l0", "layer.weight_hh_l0", "layer.bias_ih_l0")
    assert gates == "(A+A+A+A) B, (A+A+A+A) A, (A+A+A+A)"
