from typing import Any

import pytest
import torch
from helpers.axis_notation import reasons, solve, spell, trace_function
from torch import Tensor

from isoprune_hf.pruning.graph.axis import Axis, find, product
from isoprune_hf.pruning.graph.comparisons import freeze_compared
from isoprune_hf.pruning.graph.equations import Solution, solve_equations
from isoprune_hf.pruning.graph.polynomial import evaluate
from isoprune_hf.pruning.graph.trace import Equation, Trace
from isoprune_hf.pruning.graph.traced_int import Attribute, Comparison, Operation

HEADS, DIMS, WIDTH = (Attribute("block", name) for name in ("heads", "dims", "width"))


def make_trace(*equations: tuple[Any, Any]) -> Trace:
    return Trace(equations=[Equation(*sides, "block") for sides in equations])


def halved(solution: Solution) -> dict[str, int]:
    """Return the attributes after half of each leaf is removed."""
    sizes = {leaf: axis.size // 2 for leaf, axis in solution.by_id.items()}
    return {attribute.name: evaluate(found, sizes) for attribute, found in solution.attributes.items()}


def test_attribute_follows_its_axis() -> None:
    dims = Axis(8)
    solution = solve_equations(make_trace((DIMS, dims)), {DIMS: 8})
    assert halved(solution) == {"dims": 4}
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
def test_attribute_is_solved_from_arithmetic(expression: Operation, size: int, value: int, after: int) -> None:
    axis = Axis(size)
    solution = solve_equations(make_trace((expression, axis)), {WIDTH: value})
    assert axis.frozen is None and halved(solution) == {"width": after}


def test_attribute_that_occurs_twice_freezes_axis() -> None:
    axis = Axis(16)
    solution = solve_equations(make_trace((Operation("+", WIDTH, WIDTH), axis)), {WIDTH: 8})
    assert axis.frozen is not None and not solution.attributes


def test_multiple_of_attribute_is_linked_to_quotient() -> None:
    axis = Axis(16)
    solution = solve_equations(make_trace((Operation("*", WIDTH, 2), axis)), {WIDTH: 8})
    (polynomial,) = solution.attributes.values()
    (((quotient,), count),) = polynomial.items()
    assert axis.frozen is None and count == 1 and solution.by_id[quotient].size == 8
    assert solution.links == [{id(axis), quotient}]


def test_contradicting_literals_freeze() -> None:
    axis = Axis(8)
    solution = solve_equations(make_trace((axis, 4), (axis, 8), (3, 4)), {})
    assert axis.frozen is not None and not solution.links


def test_equations_are_solved_in_any_order() -> None:
    heads, dims = Axis(4), Axis(8)
    whole = product([heads, dims])
    solution = solve_equations(
        make_trace((Operation("//", WIDTH, HEADS), dims), (WIDTH, whole), (HEADS, heads)),
        {WIDTH: 32, HEADS: 4},
    )
    assert halved(solution) == {"width": 2 * 4, "heads": 2}
    assert not solution.links and heads.frozen is None and dims.frozen is None


def test_literal_freezes_its_axis() -> None:
    axis = Axis(8)
    solution = solve_equations(make_trace((DIMS, axis), (DIMS, 8)), {DIMS: 8})
    assert axis.frozen == "block computes sizes that are right for the current width only"
    assert not solution.attributes


def test_two_axes_of_one_attribute_are_linked() -> None:
    first, second = Axis(8), Axis(8)
    solution = solve_equations(make_trace((WIDTH, first), (WIDTH, second)), {WIDTH: 8})
    assert solution.links == [{id(first), id(second)}]


def test_links_that_share_an_axis_merge() -> None:
    a, b, c = Axis(8), Axis(8), Axis(16)
    solution = solve_equations(make_trace((a, b), (Operation("*", 2, b), c)), {})
    assert solution.links == [{id(a), id(b), id(c)}]


def test_width_of_heads_times_dims_follows_dims() -> None:
    width, heads, dims = Axis(32), Axis(4), Axis(8)
    heads.is_batch = True
    solution = solve_equations(make_trace((width, Operation("*", heads, dims))), {})
    assert heads.frozen is not None and dims.frozen is None
    assert solution.links == [{id(width), id(dims)}]


def test_linked_widths_without_common_divisor_freeze() -> None:
    first, second = Axis(9), Axis(4)
    solve_equations(make_trace((Operation("*", first, 4), Operation("*", second, 9))), {})
    assert first.frozen == second.frozen == "linked widths have no common divisor"


def test_quotient_of_widths_keeps_the_proportion() -> None:
    width, heads = Axis(32), Axis(4)
    solution = solve_equations(make_trace((DIMS, Operation("//", width, heads)), (HEADS, heads)), {DIMS: 8, HEADS: 4})
    assert heads.frozen is not None and width.frozen is None
    assert halved(solution) == {"dims": 4}


@pytest.mark.parametrize(
    "expression",
    [Operation("//", Axis(9), 2), Operation("%", Axis(14), 5)],
)
def test_unsolvable_equation_freezes_its_axes(expression: Operation) -> None:
    other = Axis(4)
    solve_equations(make_trace((expression, other)), {})
    assert other.frozen is not None and "cannot be traced" in other.frozen
    assert find(expression.left).frozen == other.frozen


def test_one_of_two_unknown_attributes_is_kept() -> None:
    axis = Axis(8)
    solution = solve_equations(make_trace((Operation("*", HEADS, DIMS), axis)), {HEADS: 2, DIMS: 4})
    assert axis.frozen is None and list(solution.attributes) == [HEADS]


def test_unknown_attribute_that_solves_is_kept() -> None:
    axis = Axis(8)
    channels, paths = Attribute("block", "in_channels"), Attribute("block", "num_paths")
    solution = solve_equations(make_trace((Operation("//", channels, paths), axis)), {channels: 16, paths: 2})
    assert axis.frozen is None and halved(solution) == {"in_channels": 8}


def test_equal_outcome_of_comparison_is_kept() -> None:
    first, second, other = Axis(8), Axis(8), Axis(4)
    trace = Trace(comparisons=[Comparison("==", first, second, True), Comparison("==", first, other, False)])
    assert solve_equations(trace, {}).links == [{id(first), id(second)}]
    trace = Trace(comparisons=[Comparison("!=", first, 8, False)])
    solve_equations(trace, {})
    assert first.frozen is not None and other.frozen is None


@pytest.mark.parametrize(("number", "is_frozen"), [(4, True), (0, False), (1, False)])
def test_size_compared_with_literal_freezes(number: int, is_frozen: bool) -> None:
    axis = Axis(8)
    trace = Trace(comparisons=[Comparison(">", axis, number, True)])
    solution = solve_equations(trace, {})
    assert freeze_compared(trace, solution) is is_frozen
    assert (axis.frozen is not None) is is_frozen


def test_width_divided_by_heads_is_linked() -> None:
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


def test_zeros_are_linked_to_their_size() -> None:
    trace = trace_function(lambda m: torch.cat([m.a.new_zeros(m.a.shape[0])]) + m.b, a=(4,), b=(4,))
    assert len(solve(trace).links) == 1
