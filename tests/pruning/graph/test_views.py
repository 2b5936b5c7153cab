from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers.axis_notation import reasons, solve, spell, trace_function
from torch import Tensor
from torch.nn import functional as F

from isoprune_hf.pruning.graph.rules.tables import AXIS_RULES
from isoprune_hf.pruning.graph.trace import Trace

CONSTANT = torch.zeros(6, device="meta")
SELECTED = "single elements are selected"


def numbers(like: Tensor, *shape: int) -> Tensor:
    return like.new_zeros(shape, dtype=torch.long)


# What is done -> function, parameters and numbers, axes of the parameters in the order of their names.
FOLLOWED: dict[str, tuple[Callable[[Any], Tensor], dict[str, Any], str]] = {
    "a view splits": (lambda m: m.a.view(m.heads, -1), {"a": (6,), "heads": 2}, "(A*B)"),
    "a view merges": (lambda m: m.a.flatten() + m.b, {"a": (4, 6), "b": (24,)}, "A B, (A*B)"),
    "a view moves a digit": (
        lambda m: m.a.view(m.n, -1) + m.b,
        {"a": (4, 6), "b": (2, 12), "n": 2},
        "(A*B) C, A (B*C)",
    ),
    "a view keeps runs apart": (
        lambda m: m.a.view(m.n, -1, m.k) + m.b,
        {"a": (4, 6), "b": (4, 2, 3), "n": 4, "k": 3},
        "A (B*C), A B C",
    ),
    "a view puts ones in": (lambda m: m.a.view(1, -1, 1) + m.b, {"a": (6,), "b": (1, 6, 4)}, "A, 1 A B"),
    "transposed": (lambda m: m.a.t() + m.b, {"a": (4, 6), "b": (6, 4)}, "A B, B A"),
    "swapped from behind": (lambda m: m.a.transpose(-1, -3) + m.b, {"a": (2, 3, 4), "b": (4, 3, 2)}, "A B C, C B A"),
    "permuted": (lambda m: m.a.permute(2, 0, 1) + m.b, {"a": (2, 3, 4), "b": (4, 2, 3)}, "A B C, C A B"),
    "unsqueezed from behind": (lambda m: m.a.unsqueeze(-1) + m.b, {"a": (4,), "b": (4, 6)}, "A, A B"),
    "squeezed": (lambda m: m.a.squeeze(1) + m.b, {"a": (4, 1, 6), "b": (4, 6)}, "A 1 B, A B"),
    "squeezed where nothing is": (lambda m: m.a.squeeze(1) + m.b, {"a": (4, 6), "b": (4, 6)}, "A B, A B"),
    "expanded": (lambda m: m.a.expand(m.n, -1) + m.b, {"a": (6,), "b": (4, 6), "n": 4}, "A, B A"),
    "repeated": (lambda m: m.a.repeat(m.n) + m.b, {"a": (4,), "b": (12,), "n": 3}, "A, (B*A)"),
    "repeated one by one": (
        lambda m: m.a.repeat_interleave(m.n, dim=0) + m.b,
        {"a": (4,), "b": (12,), "n": 3},
        "A, (A*B)",
    ),
    "concatenated": (lambda m: torch.cat([m.a, m.b]) + m.c, {"a": (4,), "b": (6,), "c": (10,)}, "A, B, (A+B)"),
    "concatenated in another order": (
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
    "padded further out": (lambda m: F.pad(m.a, (0, 0, 0, 2)) + m.b, {"a": (4, 5), "b": (6, 5)}, "A B, (A+2!) B"),
    "chunked": (lambda m: torch.mul(*m.a.chunk(2)), {"a": (8,)}, "(A+A)"),
    "split": (lambda m: m.a.split(m.sizes)[0] * m.b, {"a": (8,), "b": (3,), "sizes": [3, 5]}, "(A+B), A"),
    "split by literals": (lambda m: m.a.split([3, 5])[0] * m.b, {"a": (8,), "b": (3,)}, "8!, 3!"),
    "split into as many as they are": (lambda m: m.a.split(4)[1], {"a": (16,)}, "16!"),
    "sliced": (lambda m: m.a[: m.k] + m.b, {"a": (8,), "b": (3,), "k": 3}, "(A+B), A"),
    "sliced in the middle": (
        lambda m: m.a[m.k : m.k + m.b.shape[0]] + m.b,
        {"a": (8,), "b": (3,), "k": 2},
        "(A+B+C), B",
    ),
    "sliced by a literal": (lambda m: m.a[:3], {"a": (8,)}, "(3!+A)"),
    "sliced from behind": (lambda m: m.a[-3:], {"a": (8,)}, "(A+3!)"),
    "sliced up to the end": (lambda m: m.a[:-3], {"a": (8,)}, "(A+3!)"),
    "narrowed": (lambda m: m.a.narrow(0, m.k, 3), {"a": (8,), "k": 2}, "(A+3!+B)"),
    "narrowed from behind": (lambda m: m.a.narrow(0, -4, 2), {"a": (8,)}, "(A+2!+2!)"),
    "split at positions": (lambda m: m.a.tensor_split((2, 5))[1], {"a": (9,)}, "(2!+(3!+A))"),
    "sliced beside an index": (
        lambda m: m.a[2:5, numbers(m.a, 3)],
        {"a": (8, 6)},
        "(2!+3!+A) 6!",
    ),
    "every other element": (lambda m: m.a[1::2] + m.b, {"a": (8,), "b": (4,)}, "(A*2!), A"),
    "looked up": (lambda m: F.embedding(numbers(m.a, 3), m.a) + m.b, {"a": (4, 6), "b": (6,)}, "4! A, A"),
    "gated": (lambda m: F.glu(m.a, 0) + m.b, {"a": (8,), "b": (4,)}, "(A+A), A"),
    "windows to columns": (
        lambda m: F.unfold(m.a, 3) + m.b,
        {"a": (1, 4, 5, 5), "b": (1, 36, 9)},
        "1 A 5! 5!, 1 (A*9!) 9!",
    ),
    "columns to windows": (
        lambda m: F.fold(m.a, (5, 5), 3) + m.b,
        {"a": (1, 36, 9), "b": (1, 4, 5, 5)},
        "1 (A*9!) 9!, 1 A 5! 5!",
    ),
    "zeros are as wide as what they meet": (
        lambda m: m.a.new_zeros(m.a.shape[0]) + m.b,
        {"a": (4,), "b": (4,)},
        "A, B",  # as wide as the number says, so that the two are linked
    ),
}


@pytest.mark.parametrize("name", FOLLOWED)
def test_views_have_the_expected_axes(name: str) -> None:
    function, values, expected = FOLLOWED[name]
    trace = trace_function(function, **values)
    solve(trace, **values)
    assert spell(trace) == expected
    assert not trace.unknown


# What is done -> function of (4, 6), the axes, why.
FROZEN: dict[str, tuple[Callable[[Any], Tensor], str, str]] = {
    "an uneven view": (lambda m: m.a.view(m.n, -1), "4! 6!", "an uneven view"),
    "selected": (lambda m: m.a[2], "4! A", SELECTED),
    "selected from behind": (lambda m: m.a.select(-1, 0), "A 6!", SELECTED),
    "unbound": (lambda m: m.a.unbind(0)[1], "4! A", SELECTED),
    "largest position": (lambda m: m.a.argmax(1).float(), "A 6!", SELECTED),
    "an odd step": (lambda m: m.a[:, 1::4], "A 6!", SELECTED),
    "rolled": (lambda m: m.a.roll(1, 0), "4! A", "its elements are reordered"),
    "rolled as one": (lambda m: m.a.roll(1), "4! 6!", "its elements are reordered"),
    "flipped": (lambda m: m.a.flip(1), "A 6!", "its elements are reordered"),
    "added up": (lambda m: m.a.cumsum(1), "A 6!", "its elements are reordered"),
    "sorted": (lambda m: m.a.sort(0)[0], "4! A", "its elements are reordered"),
    "indexed": (lambda m: m.a[:, numbers(m.a, 5)], "A 6!", SELECTED),
    "indexed at the front": (lambda m: m.a[numbers(m.a, 5, 2)], "4! A", SELECTED),
    "selected by index": (lambda m: m.a.index_select(1, numbers(m.a, 5)), "A 6!", SELECTED),
    "windows": (lambda m: m.a.unfold(0, 2, 1), "4! A", "a window slides over it"),
    "numbered": (lambda m: m.a + torch.arange(6, device="meta"), "A 6!", "its elements are generated by position"),
    "drawn": (lambda m: m.a + torch.rand(6, device="meta"), "A 6!", "its elements are generated by position"),
    "a constant": (lambda m: m.a + CONSTANT, "A 6!", "a constant"),
    "gathered": (lambda m: m.a.gather(0, numbers(m.a, 4, 6)), "4! 6!", "no rule for the operation gather"),
    "unknown": (lambda m: torch.linalg.pinv(m.a), "4! 6!", "no rule for the operation"),
    "literal": (lambda m: m.a.view(2, 2, -1), "4! A", "the code of the model uses the literal 2"),
    "numbers of rows": (lambda m: m.a.new_zeros(4)[:, None] + m.a, "4! A", "the code of the model uses the literal 4"),
}


@pytest.mark.parametrize("name", FROZEN)
def test_element_operations_freeze_axes(name: str) -> None:
    function, expected, reason = FROZEN[name]
    trace = trace_function(function, a=(4, 6), n=3)
    assert spell(trace) == expected
    assert all(reason in found for found in reasons(trace)) and reasons(trace)


def test_unfold_freezes_image_sides() -> None:
    """An image whose side is channels: nothing may leave from it."""
    trace = trace_function(lambda m: F.unfold(m.a, 3), a=(1, 1, 5, 8))
    assert spell(trace) == "1 1 5! 8!"


@pytest.mark.parametrize("bound", ["literal", "number"])
def test_assignment_to_slice_ties_its_bound(bound: str) -> None:
    def set_part(m: Any) -> Tensor:
        mask = m.a.new_zeros(m.a.shape[0])
        mask[: 3 if bound == "literal" else m.k] = 1
        return m.a * mask

    trace = trace_function(set_part, a=(8,), k=3)
    solve(trace, k=3)
    assert spell(trace) == ("(3!+A)" if bound == "literal" else "(A+B)")


def test_attribute_used_as_position_is_constant() -> None:
    trace = trace_function(lambda m: m.a[:, m.n] + m.b.view(m.n, -1)[:, :1], a=(2, 6), b=(8,), n=4)
    solve(trace, n=4)
    assert spell(trace, "b").startswith("(4!*")


def test_mask_over_several_dims_freezes_them() -> None:
    trace = Trace()
    x, mask = torch.zeros(1, 4, 6), torch.ones(1, 4, dtype=torch.bool)
    trace.names = {id(x): ("x", x), id(mask): ("mask", mask)}
    trace.axes(x)
    AXIS_RULES["index"](trace, x[mask], x, [mask])
    assert spell(trace, "x") == "1 4! 6!"


def test_uneven_chunks_freeze_the_axis() -> None:
    trace = trace_function(lambda m: torch.cat(m.a.chunk(3)), a=(10,))
    solve(trace)
    assert spell(trace) == "10!"
