import copy
import pickle

import pytest
import torch
from torch import nn

from isoprune_hf.pruning.graph.axis import Axis
from isoprune_hf.pruning.graph.traced_int import (
    ARITHMETIC,
    COMPARE,
    Attribute,
    Comparison,
    Operation,
    TracedInt,
    atoms,
    expression_of,
    mark_attributes,
)

HEADS, WIDTH = Attribute("block", "heads"), Axis(12)


def make(value: int, expression, comparisons: list[Comparison] | None = None) -> TracedInt:
    return TracedInt(value, expression, [] if comparisons is None else comparisons)


@pytest.mark.parametrize("symbol", ARITHMETIC)
def test_arithmetic_records_both_operands(symbol: str) -> None:
    heads, width = make(3, HEADS), make(12, WIDTH)
    found = ARITHMETIC[symbol](width, heads)
    assert found == ARITHMETIC[symbol](12, 3)
    assert found.expression == Operation(symbol, WIDTH, HEADS)


@pytest.mark.parametrize("symbol", ARITHMETIC)
def test_literal_operand_keeps_its_side(symbol: str) -> None:
    assert ARITHMETIC[symbol](make(12, WIDTH), 5).expression == Operation(symbol, WIDTH, 5)
    assert ARITHMETIC[symbol](17, make(12, WIDTH)).expression == Operation(symbol, 17, WIDTH)


def test_other_operations_return_plain_numbers() -> None:
    heads = make(3, HEADS)
    for plain in (heads * 0.5, heads**-0.5, heads / 3, float(heads)):
        assert type(plain) is float
    assert type(int(heads)) is int and expression_of(int(heads)) == 3
    assert expression_of(round(heads * 1.0)) == 3


@pytest.mark.parametrize("symbol", COMPARE)
def test_comparison_is_recorded_with_outcome(symbol: str) -> None:
    noted: list[Comparison] = []
    assert COMPARE[symbol](make(3, HEADS, noted), 4) is COMPARE[symbol](3, 4)
    assert noted == [Comparison(symbol, HEADS, 4, COMPARE[symbol](3, 4))]


@pytest.mark.parametrize(
    ("symbol", "bound"), [("<", 3), ("<=", 2), (">", 2), (">=", 3)], ids=["less", "at most", "more", "at least"]
)
def test_comparison_with_fraction_is_rounded(symbol: str, bound: int) -> None:
    for value in (1, 2, 3, 4):
        noted: list[Comparison] = []
        outcome = COMPARE[symbol](make(value, HEADS, noted), 2.5)
        assert outcome is COMPARE[symbol](value, 2.5) is COMPARE[symbol](value, bound)
        assert noted == [Comparison(symbol, HEADS, bound, outcome)]


def test_comparison_with_other_types_is_not_recorded() -> None:
    noted: list[Comparison] = []
    heads = make(3, HEADS, noted)
    assert not heads == "3" and heads != None and heads < float("inf")  # noqa: E711, SIM201
    assert noted == []


def test_traced_int_hashes_and_pickles_as_int() -> None:
    heads = make(3, HEADS)
    assert {3: "three"}[heads] == "three"
    for copied in (copy.deepcopy(heads), pickle.loads(pickle.dumps(heads))):
        assert type(copied) is int and copied == 3
    assert torch.zeros(heads, heads).shape == (3, 3)


def test_atoms_are_attributes_and_axes() -> None:
    expression = Operation("*", Operation("+", HEADS, 2), Operation("//", WIDTH, HEADS))
    assert list(atoms(expression)) == [HEADS, WIDTH, HEADS]
    assert list(atoms(7)) == []


def test_integer_attributes_of_modules_are_traced() -> None:
    network = nn.Sequential(nn.Linear(3, 4))
    layer = network[0]
    layer.sizes, layer.pair, layer.name, layer.rate, layer.is_on, layer.mixed = (
        [4, 5],
        (1, 2),
        "x",
        0.5,
        True,
        [1, "x"],
    )
    mark_attributes(network)
    assert layer.out_features == 4 and layer.out_features.expression == Attribute("0", "out_features")
    assert [size.expression for size in layer.sizes] == [Attribute("0", "sizes", place) for place in (0, 1)]
    assert type(layer.pair) is tuple and layer.pair[1].expression == Attribute("0", "pair", 1)
    assert (layer.rate, layer.is_on, layer.mixed) == (0.5, True, [1, "x"]) and type(layer.mixed[0]) is int
