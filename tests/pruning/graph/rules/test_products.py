import pytest
import torch
from helpers.axis_notation import AxisCase, check_axes, spell, trace_function, trace_layer
from torch import nn
from torch.nn import functional as F

from isoprune_hf.pruning.graph.axis import find, leaves

IMAGE = (1, 8, 5, 5)

# Name -> function, its parameters and attributes, and the axes of the parameters.
CASES: dict[str, AxisCase] = {
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
    "fused attention": (
        lambda m: F.scaled_dot_product_attention(m.k, m.q, m.v) + m.y,
        {"k": (1, 2, 4, 6), "q": (1, 2, 3, 6), "v": (1, 2, 3, 5), "y": (4, 5)},
        "1 A B C, 1 A D C, 1 A D E, B E",
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_products_have_the_expected_axes(name: str) -> None:
    check_axes(CASES[name])


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


def test_torch_attention_has_heads_and_dims() -> None:
    attention = nn.MultiheadAttention(8, 2, batch_first=True)
    trace = trace_layer(attention, lambda m: m.layer(m.x, m.x, m.x, need_weights=False)[0], x=(1, 5, 8))
    assert spell(trace) == "(3!*(A*B)), (3!*(A*B)) C, D, D (A*B), 1 E C"
    head, dim = leaves(trace.tensors["layer.out_proj.weight"][1])
    assert (head.size, dim.size, head.is_batch, dim.is_batch) == (2, 4, True, False)


def test_attention_keeps_equal_widths_of_keys_and_values() -> None:
    attention = nn.MultiheadAttention(8, 2, kdim=6, vdim=10, batch_first=True)
    trace = trace_layer(
        attention, lambda m: m.layer(m.q, m.k, m.v, need_weights=False)[0], q=(1, 5, 8), k=(1, 4, 6), v=(1, 4, 10)
    )
    names = ("layer.q_proj_weight", "layer.k_proj_weight", "layer.v_proj_weight", "layer.out_proj.weight")
    assert spell(trace, *names) == "(A*B) C, (A*B) D, (A*B) E, F (A*B)"
