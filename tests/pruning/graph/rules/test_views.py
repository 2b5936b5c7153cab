import pytest
import torch
from helpers.axis_notation import AxisCase, FrozenCase, check_axes, check_frozen, zero_positions

# Name -> function, its parameters and attributes, and the axes of the parameters.
CASES: dict[str, AxisCase] = {
    "transposed": (lambda m: m.a.t() + m.b, {"a": (4, 6), "b": (6, 4)}, "A B, B A"),
    "a view splits": (lambda m: m.a.view(m.heads, -1), {"a": (6,), "heads": 2}, "(A*B)"),
    "a view merges": (lambda m: m.a.flatten() + m.b, {"a": (4, 6), "b": (24,)}, "A B, (A*B)"),
    "a view moves a factor": (
        lambda m: m.a.view(m.n, -1) + m.b,
        {"a": (4, 6), "b": (2, 12), "n": 2},
        "(A*B) C, A (B*C)",
    ),
    "a view of separate runs": (
        lambda m: m.a.view(m.n, -1, m.k) + m.b,
        {"a": (4, 6), "b": (4, 2, 3), "n": 4, "k": 3},
        "A (B*C), A B C",
    ),
    "a view inserts ones": (lambda m: m.a.view(1, -1, 1) + m.b, {"a": (6,), "b": (1, 6, 4)}, "A, 1 A B"),
    "transposed from the end": (
        lambda m: m.a.transpose(-1, -3) + m.b,
        {"a": (2, 3, 4), "b": (4, 3, 2)},
        "A B C, C B A",
    ),
    "permuted": (lambda m: m.a.permute(2, 0, 1) + m.b, {"a": (2, 3, 4), "b": (4, 2, 3)}, "A B C, C A B"),
    "unsqueezed at the end": (lambda m: m.a.unsqueeze(-1) + m.b, {"a": (4,), "b": (4, 6)}, "A, A B"),
    "squeezed": (lambda m: m.a.squeeze(1) + m.b, {"a": (4, 1, 6), "b": (4, 6)}, "A 1 B, A B"),
    "squeezed without effect": (lambda m: m.a.squeeze(1) + m.b, {"a": (4, 6), "b": (4, 6)}, "A B, A B"),
    "expanded": (lambda m: m.a.expand(m.n, -1) + m.b, {"a": (6,), "b": (4, 6), "n": 4}, "A, B A"),
    "repeated": (lambda m: m.a.repeat(m.n) + m.b, {"a": (4,), "b": (12,), "n": 3}, "A, (B*A)"),
    "elements repeated": (
        lambda m: m.a.repeat_interleave(m.n, dim=0) + m.b,
        {"a": (4,), "b": (12,), "n": 3},
        "A, (A*B)",
    ),
}


# Name -> function of a parameter `a` of (4, 6), its axes, and the reason why one is frozen.
FROZEN: dict[str, FrozenCase] = {
    "an uneven view": (lambda m: m.a.view(m.n, -1), "4! 6!", "an uneven view"),
    "gathered": (lambda m: m.a.gather(0, zero_positions(m.a, 4, 6)), "4! 6!", "no rule for the operation gather"),
    "unknown": (lambda m: torch.linalg.pinv(m.a), "4! 6!", "no rule for the operation"),
    "literal": (lambda m: m.a.view(2, 2, -1), "4! A", "the code of the model uses the literal 2"),
}


@pytest.mark.parametrize("name", CASES)
def test_views_have_the_expected_axes(name: str) -> None:
    check_axes(CASES[name])


@pytest.mark.parametrize("name", FROZEN)
def test_views_freeze_axes(name: str) -> None:
    check_frozen(FROZEN[name])
