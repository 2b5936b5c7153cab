import pytest

from isoprune_hf.pruning.graph.axis import Axis, freeze, product
from isoprune_hf.pruning.graph.polynomial import Unsolvable, combine, divide, evaluate, invert, size_polynomial


def test_polynomial_arithmetic_by_hand() -> None:
    a, b = Axis(3), Axis(5)
    one, other = {(id(a),): 1}, {(id(b),): 1}
    both = tuple(sorted((id(a), id(b))))
    by_id: dict[int, Axis] = {}
    assert size_polynomial(product([a, b]), by_id) == {both: 1}
    assert by_id == {id(a): a, id(b): b}
    assert combine("*", combine("+", one, {(): 2}), other) == {both: 1, (id(b),): 2}
    assert combine("-", one, one) == {}
    assert divide({both: 6, (id(b),): 4}, {(id(b),): 2}) == {(id(a),): 3, (): 2}
    assert combine("%", {both: 6}, {(id(b),): 2}) == {}
    assert combine("//", {(): 7}, {(): 2}) == {(): 3} and combine("%", {(): 6}, {(): 2}) == {}
    assert evaluate({both: 2, (): 1}, {id(a): 3, id(b): 5}) == 31
    freeze(a, "a reason")
    assert size_polynomial(product([a, b]), {}) == {(id(b),): 3}


@pytest.mark.parametrize("wrong", ["another leaf", "a sum", "a remainder"])
def test_division_with_remainder_is_unsolvable(wrong: str) -> None:
    a, b = {(1,): 3}, {(2,): 1}
    divisor = {"another leaf": b, "a sum": {(1,): 1, (): 1}, "a remainder": {(1,): 2}}[wrong]
    with pytest.raises(Unsolvable, match="a division"):
        divide(a, divisor)


@pytest.mark.parametrize(("symbol", "in_left", "expected"), [("+", True, 4), ("-", True, 8), ("-", False, -4)])
def test_sums_and_differences_are_inverted(symbol: str, in_left: bool, expected: int) -> None:
    assert invert(symbol, {(): 6}, {(): 2}, in_left=in_left) == {(): expected}
