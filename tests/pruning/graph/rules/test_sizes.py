import pytest
import torch
from helpers.axis_notation import AxisCase, check_axes, reasons, solve, spell, trace_function
from torch import Tensor

from isoprune_hf.pruning.graph.polynomial import evaluate
from isoprune_hf.pruning.graph.traced_int import Attribute

# Name -> function, its parameters and attributes, and the axes of the parameters.
CASES: dict[str, AxisCase] = {
    "a vector": (lambda m: m.x.view(-1, m.a.numel()) * m.a, {"a": (8,), "x": (4, 8)}, "A, B A"),
    "a vector by its other name": (lambda m: m.x.view(-1, m.a.nelement()) * m.a, {"a": (8,), "x": (4, 8)}, "A, B A"),
    "a vector by the function": (lambda m: m.x.view(-1, torch.numel(m.a)) * m.a, {"a": (8,), "x": (4, 8)}, "A, B A"),
    "a matrix": (lambda m: m.a.view(m.a.numel()) * m.b, {"a": (4, 6), "b": (24,)}, "A B, (A*B)"),
}


@pytest.mark.parametrize("name", CASES)
def test_number_of_elements_is_followed(name: str) -> None:
    check_axes(CASES[name])


def test_attribute_follows_a_number_of_elements() -> None:
    def forward(m: torch.nn.Module) -> Tensor:
        assert m.a.numel() == m.dim // 4
        return m.a * m.b

    trace = trace_function(forward, a=(6,), b=(6,), dim=24)
    solution = solve(trace, dim=24)
    assert spell(trace) == "A, A"
    leaf = next(iter(solution.by_id))
    assert evaluate(solution.attributes[Attribute("", "dim")], {leaf: 5}) == 20


def test_length_is_a_literal_and_freezes() -> None:
    trace = trace_function(lambda m: m.x.view(-1, len(m.a)) * m.a, a=(8,), x=(4, 8))
    assert spell(trace) == "8!, A 8!"
    assert reasons(trace) == {"the code of the model uses the literal 8"}
