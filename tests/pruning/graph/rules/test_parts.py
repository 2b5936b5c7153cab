from typing import Any

import pytest
import torch
from helpers.axis_notation import (
    AxisCase,
    FrozenCase,
    check_axes,
    check_frozen,
    solve,
    spell,
    trace_function,
    trace_layer,
    zero_positions,
)
from torch import Tensor, nn
from torch.nn import functional as F

SELECTED = "single elements are selected"


# Name -> function, its parameters and attributes, and the axes of the parameters.
CASES: dict[str, AxisCase] = {
    "concatenated": (lambda m: torch.cat([m.a, m.b]) + m.c, {"a": (4,), "b": (6,), "c": (10,)}, "A, B, (A+B)"),
    "concatenated in reverse order": (
        lambda m: torch.cat([m.b, m.a]) + m.c,
        {"a": (4,), "b": (6,), "c": (10,)},
        "A, B, (B+A)",
    ),
    "concatenated along tokens": (
        lambda m: torch.cat([m.a, m.b], dim=-2),
        {"a": (4, 6), "b": (5, 6)},
        "A B, C B",
    ),
    "stacked": (lambda m: torch.stack([m.a, m.b]) + m.c, {"a": (4,), "b": (4,), "c": (2, 4)}, "A, A, 2! A"),
    "padded": (lambda m: F.pad(m.a, (2, 3)) + m.b, {"a": (4,), "b": (9,)}, "A, (2!+A+3!)"),
    "padded in dim 0": (
        lambda m: F.pad(m.a, (0, 0, 0, 2)) + m.b,
        {"a": (4, 5), "b": (6, 5)},
        "A B, (A+2!) B",
    ),
    "chunked": (lambda m: torch.mul(*m.a.chunk(2)), {"a": (8,)}, "(A+A)"),
    "split": (lambda m: m.a.split(m.sizes)[0] * m.b, {"a": (8,), "b": (3,), "sizes": [3, 5]}, "(A+B), A"),
    "split by literals": (lambda m: m.a.split([3, 5])[0] * m.b, {"a": (8,), "b": (3,)}, "8!, 3!"),
    "split by a literal size": (lambda m: m.a.split(4)[1], {"a": (16,)}, "16!"),
    "sliced": (lambda m: m.a[: m.k] + m.b, {"a": (8,), "b": (3,), "k": 3}, "(A+B), A"),
    "sliced in the middle": (
        lambda m: m.a[m.k : m.k + m.b.shape[0]] + m.b,
        {"a": (8,), "b": (3,), "k": 2},
        "(A+B+C), B",
    ),
    "sliced by a literal": (lambda m: m.a[:3], {"a": (8,)}, "(3!+A)"),
    "sliced by a negative start": (lambda m: m.a[-3:], {"a": (8,)}, "(A+3!)"),
    "sliced by a negative stop": (lambda m: m.a[:-3], {"a": (8,)}, "(A+3!)"),
    "narrowed": (lambda m: m.a.narrow(0, m.k, 3), {"a": (8,), "k": 2}, "(A+3!+B)"),
    "narrowed by a negative start": (lambda m: m.a.narrow(0, -4, 2), {"a": (8,)}, "(A+2!+2!)"),
    "split at positions": (lambda m: m.a.tensor_split((2, 5))[1], {"a": (9,)}, "(2!+(3!+A))"),
    "sliced next to an index": (
        lambda m: m.a[2:5, zero_positions(m.a, 3)],
        {"a": (8, 6)},
        "(2!+3!+A) 6!",
    ),
    "every other element": (lambda m: m.a[1::2] + m.b, {"a": (8,), "b": (4,)}, "(A*2!), A"),
    "gated": (lambda m: F.glu(m.a, 0) + m.b, {"a": (8,), "b": (4,)}, "(A+A), A"),
}


# Name -> function of a parameter `a` of (4, 6), its axes, and the reason why one is frozen.
FROZEN: dict[str, FrozenCase] = {
    "an odd step": (lambda m: m.a[:, 1::4], "A 6!", SELECTED),
}


@pytest.mark.parametrize("name", CASES)
def test_contiguous_parts_have_the_expected_axes(name: str) -> None:
    check_axes(CASES[name])


@pytest.mark.parametrize("name", FROZEN)
def test_contiguous_parts_freeze_axes(name: str) -> None:
    check_frozen(FROZEN[name])


@pytest.mark.parametrize("bound", ["literal", "number"])
def test_assignment_to_slice_ties_its_bound(bound: str) -> None:
    def set_part(m: Any) -> Tensor:
        mask = m.a.new_zeros(m.a.shape[0])
        mask[: 3 if bound == "literal" else m.k] = 1
        return m.a * mask

    trace = trace_function(set_part, a=(8,), k=3)
    solve(trace, k=3)
    assert spell(trace) == ("(3!+A)" if bound == "literal" else "(A+B)")


def test_uneven_chunks_freeze_the_axis() -> None:
    trace = trace_function(lambda m: torch.cat(m.a.chunk(3)), a=(10,))
    solve(trace)
    assert spell(trace) == "10!"


def test_recurrent_layer_ties_its_gates() -> None:
    trace = trace_layer(nn.LSTM(8, 6, batch_first=True), lambda m: m.layer(m.x)[0], x=(1, 3, 8))
    gates = spell(trace, "layer.weight_ih_l0", "layer.weight_hh_l0", "layer.bias_ih_l0")
    assert gates == "(A+A+A+A) B, (A+A+A+A) A, (A+A+A+A)"
