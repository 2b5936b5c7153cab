"""Axes as text: trace a function of a few parameters, and spell the axes of the parameters.

Free leaves are letters in the order of their first appearance; equal letters are the same leaf. An axis that is frozen
as a whole is its size with a `!`. `(A*B)` is a product, the outer factor first, and `(A+B)` a sum.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from isoprune_hf.pruning.graph.axis import Axis, find, is_frozen, leaves
from isoprune_hf.pruning.graph.equations import Solution, solve_equations
from isoprune_hf.pruning.graph.trace import Trace
from isoprune_hf.pruning.graph.traced_int import Attribute
from isoprune_hf.pruning.graph.tracer import trace_network

# A function, its parameters and attributes, and the axes of the parameters in the order of their names.
AxisCase = tuple[Callable[[Any], Tensor], dict[str, Any], str]
# A function of a parameter `a`, the axes of `a`, and a part of every reason why one of them is frozen.
FrozenCase = tuple[Callable[[Any], Tensor], str, str]


class Function(nn.Module):
    """A function as a module: tuples of sizes become parameters of these sizes, other values become attributes."""

    def __init__(self, function: Callable[[Any], Tensor], **values: Any):
        super().__init__()
        self.function = function
        for name, value in values.items():
            is_shape = isinstance(value, tuple)
            setattr(self, name, nn.Parameter(torch.zeros(value, device="meta")) if is_shape else value)

    def forward(self, _: Tensor) -> Tensor:
        return self.function(self).sum()


def trace_function(function: Callable[[Any], Tensor], **values: Any) -> Trace:
    """Trace a function; its result is summed, because the axes of a network's output are frozen."""
    return trace_network(Function(function, **values).eval(), torch.zeros(1, 3, 4, 4, device="meta"))


def trace_layer(layer: nn.Module, function: Callable[[Any], Tensor], **values: Any) -> Trace:
    """Trace a function that calls `m.layer`."""
    network = Function(function, **values)
    network.layer = layer.to("meta")
    return trace_network(network.eval(), torch.zeros(1, 3, 4, 4, device="meta"))


def solve(trace: Trace, **values: Any) -> Solution:
    """Solve the equations of a trace, which freezes axes in place, as the engine does."""
    numbers: dict[Attribute, int] = {}
    for name, value in values.items():
        if isinstance(value, int):
            numbers[Attribute("", name)] = value
        elif isinstance(value, list):
            numbers.update({Attribute("", name, place): entry for place, entry in enumerate(value)})
    return solve_equations(trace, numbers)


def spell(trace: Trace, *names: str) -> str:
    """Spell the axes of tensors, by default of all in the order of their names: `A B, (B*2!)`."""
    letters: dict[int, str] = {}

    def text(axis: Axis) -> str:
        axis = find(axis)
        if axis.size == 1 or is_frozen(axis):
            return "1" if axis.size == 1 else f"{axis.size}!"
        if axis.kind == "leaf":
            return letters.setdefault(id(axis), chr(ord("A") + len(letters)))
        return "(" + ("*" if axis.kind == "product" else "+").join(map(text, axis.parts)) + ")"

    return ", ".join(" ".join(map(text, trace.tensors[name])) for name in names or sorted(trace.tensors))


def reasons(trace: Trace) -> set[str]:
    """Return the reasons why leaves of the parameters are frozen."""
    found = {leaf.frozen for axes in trace.tensors.values() for axis in axes for leaf in leaves(axis) if leaf.size > 1}
    return {reason for reason in found if reason is not None}


def zero_positions(like: Tensor, *shape: int) -> Tensor:
    """Create positions for indexing, on the device of a tensor."""
    return like.new_zeros(shape, dtype=torch.long)


def check_axes(case: AxisCase) -> None:
    """Assert that a function has the expected axes and consists of operations with rules."""
    function, values, expected = case
    trace = trace_function(function, **values)
    solve(trace, **values)
    assert spell(trace) == expected
    assert not trace.unknown


def check_frozen(case: FrozenCase) -> None:
    """Assert that a function of a parameter of (4, 6) freezes the expected axes for the expected reason."""
    function, expected, reason = case
    trace = trace_function(function, a=(4, 6), n=3)
    assert spell(trace) == expected
    assert all(reason in found for found in reasons(trace)) and reasons(trace)
