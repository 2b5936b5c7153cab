from typing import Any

import pytest
import torch
from helpers.axis_notation import reasons, solve, spell, trace_function
from torch import Tensor

from isoprune_hf.pruning.graph.axis import Axis, find, freeze, product
from isoprune_hf.pruning.graph.equations import (
    Unsolvable,
    _combine,
    _divide,
    _invert,
    evaluate,
    freeze_compared,
    size_polynomial,
    solve_equations,
)
from isoprune_hf.pruning.graph.trace import Equation, Trace
from isoprune_hf.pruning.graph.traced_int import Attribute, Comparison, Operation

HEADS, DIMS, WIDTH = (Attribute("block", name) for name in ("heads", "dims", "width"))


def make_trace(*equations: tuple[Any, Any]) -> Trace:
    return Trace(equations=[Equation(*sides, "block") for sides in equations])


def numbers(solution: Any, **sizes: int) -> dict[str, int]:
    return {
        attribute.name: evaluate(found, solution_sizes(solution)) for attribute, found in solution.attributes.items()
    }


def solution_sizes(solution: Any) -> dict[int, int]:
    """Half of each leaf."""
    return {leaf: axis.size // 2 for leaf, axis in solution.by_id.items()}


def test_an_attribute_follows_the_axis_that_it_is_the_size_of() -> None:
    dims = Axis(8)
    solution = solve_equations(make_trace((DIMS, dims)), {DIMS: 8})
    assert numbers(solution) == {"dims": 4}
    assert dims.frozen is None


@pytest.mark.parametrize(
    ("expression", "size", "value", "after"),
    [
        (Operation("//", WIDTH, 2), 8, 16, 8),
        (Operation("+", WIDTH, 2), 8, 6, 2),
        (Operation("-", WIDTH, 2), 8, 10, 6),
        (Operation("-", 10, WIDTH), 8, 2, 6),
    ],
)
def test_an_attribute_is_solved_from_arithmetic(expression: Operation, size: int, value: int, after: int) -> None:
    axis = Axis(size)
    solution = solve_equations(make_trace((expression, axis)), {WIDTH: value})
    assert axis.frozen is None and numbers(solution) == {"width": after}


def test_an_attribute_that_occurs_twice_freezes_the_axis() -> None:
    axis = Axis(16)
    solution = solve_equations(make_trace((Operation("+", WIDTH, WIDTH), axis)), {WIDTH: 8})
    assert axis.frozen is not None and not solution.attributes


def test_an_axis_that_is_a_multiple_of_an_attribute_leaves_in_units() -> None:
    axis = Axis(16)
    solution = solve_equations(make_trace((Operation("*", WIDTH, 2), axis)), {WIDTH: 8})
    (polynomial,) = solution.attributes.values()
    (((quotient,), count),) = polynomial.items()
    assert axis.frozen is None and count == 1 and solution.by_id[quotient].size == 8
    assert solution.links == [{id(axis), quotient}]


def test_numbers_that_contradict_each_other_freeze_and_settle() -> None:
    axis = Axis(8)
    solution = solve_equations(make_trace((axis, 4), (axis, 8), (3, 4)), {})
    assert axis.frozen is not None and not solution.links


def test_several_equations_are_solved_in_any_order() -> None:
    heads, dims = Axis(4), Axis(8)
    whole = product([heads, dims])
    solution = solve_equations(
        make_trace((Operation("//", WIDTH, HEADS), dims), (WIDTH, whole), (HEADS, heads)),
        {WIDTH: 32, HEADS: 4},
    )
    assert numbers(solution) == {"width": 2 * 4, "heads": 2}
    assert not solution.links and heads.frozen is None and dims.frozen is None


def test_a_literal_freezes_what_it_is_the_size_of() -> None:
    axis = Axis(8)
    solution = solve_equations(make_trace((DIMS, axis), (DIMS, 8)), {DIMS: 8})
    assert axis.frozen == "block computes sizes that no other width fulfils"
    assert not solution.attributes


def test_two_axes_of_one_number_leave_in_proportion() -> None:
    first, second = Axis(8), Axis(8)
    solution = solve_equations(make_trace((WIDTH, first), (WIDTH, second)), {WIDTH: 8})
    assert solution.links == [{id(first), id(second)}]


def test_links_that_share_an_axis_are_one() -> None:
    a, b, c = Axis(8), Axis(8), Axis(16)
    solution = solve_equations(make_trace((a, b), (Operation("*", 2, b), c)), {})
    assert solution.links == [{id(a), id(b), id(c)}]


def test_a_width_of_heads_and_dims_keeps_the_heads_and_follows_the_dims() -> None:
    width, heads, dims = Axis(32), Axis(4), Axis(8)
    heads.is_batch = True
    solution = solve_equations(make_trace((width, Operation("*", heads, dims))), {})
    assert heads.frozen is not None and dims.frozen is None
    assert solution.links == [{id(width), id(dims)}]


def test_widths_without_a_common_divisor_stay() -> None:
    first, second = Axis(9), Axis(4)
    solve_equations(make_trace((Operation("*", first, 4), Operation("*", second, 9))), {})
    assert first.frozen == second.frozen == "widths that are linked have no common divisor"


def test_a_quotient_is_a_size_of_its_own_that_keeps_the_proportion() -> None:
    width, heads = Axis(32), Axis(4)
    solution = solve_equations(make_trace((DIMS, Operation("//", width, heads)), (HEADS, heads)), {DIMS: 8, HEADS: 4})
    assert heads.frozen is not None and width.frozen is None
    assert numbers(solution) == {"dims": 4}


@pytest.mark.parametrize(
    "expression",
    [Operation("//", Axis(9), 2), Operation("%", Axis(14), 5)],
)
def test_what_is_not_solved_freezes_its_axes(expression: Operation) -> None:
    other = Axis(4)
    solve_equations(make_trace((expression, other)), {})
    assert other.frozen is not None and "cannot be followed" in other.frozen
    assert find(expression.left).frozen == other.frozen


def test_of_two_attributes_that_nothing_names_alone_one_stays() -> None:
    axis = Axis(8)
    solution = solve_equations(make_trace((Operation("*", HEADS, DIMS), axis)), {HEADS: 2, DIMS: 4})
    assert axis.frozen is None and list(solution.attributes) == [HEADS]


def test_what_was_compared_and_equal_stays_equal() -> None:
    first, second, other = Axis(8), Axis(8), Axis(4)
    trace = Trace(comparisons=[Comparison("==", first, second, True), Comparison("==", first, other, False)])
    assert solve_equations(trace, {}).links == [{id(first), id(second)}]
    trace = Trace(comparisons=[Comparison("!=", first, 8, False)])
    solve_equations(trace, {})
    assert first.frozen is not None and other.frozen is None


@pytest.mark.parametrize(("number", "is_frozen"), [(4, True), (0, False), (1, False)])
def test_what_is_compared_with_a_number_above_one_stays(number: int, is_frozen: bool) -> None:
    axis = Axis(8)
    trace = Trace(comparisons=[Comparison(">", axis, number, True)])
    solution = solve_equations(trace, {})
    assert freeze_compared(trace, solution) is is_frozen
    assert (axis.frozen is not None) is is_frozen


def test_polynomials_by_hand() -> None:
    a, b = Axis(3), Axis(5)
    one, other = {(id(a),): 1}, {(id(b),): 1}
    both = tuple(sorted((id(a), id(b))))
    by_id: dict[int, Axis] = {}
    assert size_polynomial(product([a, b]), by_id) == {both: 1}
    assert by_id == {id(a): a, id(b): b}
    assert _combine("*", _combine("+", one, {(): 2}), other) == {both: 1, (id(b),): 2}
    assert _combine("-", one, one) == {}
    assert _divide({both: 6, (id(b),): 4}, {(id(b),): 2}) == {(id(a),): 3, (): 2}
    assert _combine("%", {both: 6}, {(id(b),): 2}) == {}
    assert _combine("//", {(): 7}, {(): 2}) == {(): 3} and _combine("%", {(): 6}, {(): 2}) == {}
    assert evaluate({both: 2, (): 1}, {id(a): 3, id(b): 5}) == 31
    freeze(a, "a reason")
    assert size_polynomial(product([a, b]), {}) == {(id(b),): 3}


@pytest.mark.parametrize("wrong", ["another leaf", "a sum", "a rest"])
def test_a_division_that_leaves_a_rest_is_not_solved(wrong: str) -> None:
    a, b = {(1,): 3}, {(2,): 1}
    divisor = {"another leaf": b, "a sum": {(1,): 1, (): 1}, "a rest": {(1,): 2}}[wrong]
    with pytest.raises(Unsolvable, match="a division"):
        _divide(a, divisor)


@pytest.mark.parametrize(("symbol", "in_left", "expected"), [("+", True, 4), ("-", True, 8), ("-", False, -4)])
def test_an_expression_is_inverted(symbol: str, in_left: bool, expected: int) -> None:
    assert _invert(symbol, {(): 6}, {(): 2}, in_left=in_left) == {(): expected}


def test_a_width_by_a_number_of_heads_is_linked_in_a_whole_trace() -> None:
    def attend(m: Any) -> Tensor:
        width = m.x.shape[-1]
        heads = (m.x @ m.w).view(-1, m.heads, width // m.heads).transpose(0, 1)
        return (heads @ heads.transpose(1, 2)).softmax(-1)

    trace = trace_function(attend, x=(3, 8), w=(8, 8), heads=2)
    solution = solve(trace, heads=2)
    assert spell(trace) == "A (2!*B), C A"
    width, dims = find(trace.tensors["w"][0]), find(find(trace.tensors["w"][1]).parts[1])
    assert len(solution.links) == 1 and {id(width), id(dims)} <= solution.links[0]
    assert any("from it and another width" in reason for reason in reasons(trace))


def test_zeros_as_wide_as_another_tensor_are_linked_to_it() -> None:
    trace = trace_function(lambda m: torch.cat([m.a.new_zeros(m.a.shape[0])]) + m.b, a=(4,), b=(4,))
    assert len(solve(trace).links) == 1
