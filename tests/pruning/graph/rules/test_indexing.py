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
    zero_positions,
)
from torch.nn import functional as F

from isoprune_hf.pruning.graph.rules.tables import AXIS_RULES
from isoprune_hf.pruning.graph.trace import Trace

SELECTED = "single elements are selected"


# Name -> function, its parameters and attributes, and the axes of the parameters.
CASES: dict[str, AxisCase] = {
    "embedded": (lambda m: F.embedding(zero_positions(m.a, 3), m.a) + m.b, {"a": (4, 6), "b": (6,)}, "4! A, A"),
}


# Name -> function of a parameter `a` of (4, 6), its axes, and the reason why one is frozen.
FROZEN: dict[str, FrozenCase] = {
    "selected": (lambda m: m.a[2], "4! A", SELECTED),
    "selected by a negative dim": (lambda m: m.a.select(-1, 0), "A 6!", SELECTED),
    "unbound": (lambda m: m.a.unbind(0)[1], "4! A", SELECTED),
    "largest position": (lambda m: m.a.argmax(1).float(), "A 6!", SELECTED),
    "rolled": (lambda m: m.a.roll(1, 0), "4! A", "its elements are reordered"),
    "rolled over all dims": (lambda m: m.a.roll(1), "4! 6!", "its elements are reordered"),
    "flipped": (lambda m: m.a.flip(1), "A 6!", "its elements are reordered"),
    "cumulative sum": (lambda m: m.a.cumsum(1), "A 6!", "its elements are reordered"),
    "sorted": (lambda m: m.a.sort(0)[0], "4! A", "its elements are reordered"),
    "indexed": (lambda m: m.a[:, zero_positions(m.a, 5)], "A 6!", SELECTED),
    "indexed at the front": (lambda m: m.a[zero_positions(m.a, 5, 2)], "4! A", SELECTED),
    "selected by index": (lambda m: m.a.index_select(1, zero_positions(m.a, 5)), "A 6!", SELECTED),
}


@pytest.mark.parametrize("name", CASES)
def test_indexing_have_the_expected_axes(name: str) -> None:
    check_axes(CASES[name])


@pytest.mark.parametrize("name", FROZEN)
def test_indexing_freeze_axes(name: str) -> None:
    check_frozen(FROZEN[name])


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
