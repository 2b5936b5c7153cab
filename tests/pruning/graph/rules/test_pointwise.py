from typing import Any

import pytest
import torch
from helpers.axis_notation import AxisCase, check_axes
from torch import Tensor


def _copied(m: Any) -> Tensor:
    table = torch.empty_like(m.a)
    table.copy_(m.b)
    return table


# Name -> function, its parameters and attributes, and the axes of the parameters.
CASES: dict[str, AxisCase] = {
    "a sum": (lambda m: m.a + m.b, {"a": (4, 6), "b": (6,)}, "A B, B"),
    "a sum over ones": (lambda m: m.a + m.b, {"a": (4, 1), "b": (6,)}, "A 1, B"),
    "a condition": (lambda m: torch.where(m.a > 0, m.b, m.c), {"a": (4, 1), "b": (6,), "c": (4, 6)}, "A 1, B, A B"),
    "a mask": (lambda m: m.a.masked_fill(m.b > 0, 0), {"a": (4, 6), "b": (6,)}, "A B, B"),
    "copied into a tensor": (lambda m: _copied(m), {"a": (4, 6), "b": (6,)}, "A B, B"),
    "three factors": (lambda m: torch.addcmul(m.a, m.b, m.c), {"a": (4, 6), "b": (6,), "c": (4, 1)}, "A B, B, A 1"),
    "a softmax": (lambda m: m.a.softmax(-1) + m.b, {"a": (4, 6), "b": (6,)}, "A B, B"),
    "the larger of two": (lambda m: torch.maximum(m.a, m.b), {"a": (4, 6), "b": (6,)}, "A B, B"),
    "the larger of two, by max": (lambda m: torch.max(m.a, m.b), {"a": (4, 6), "b": (6,)}, "A B, B"),
}


@pytest.mark.parametrize("name", CASES)
def test_pointwise_have_the_expected_axes(name: str) -> None:
    check_axes(CASES[name])
