"""Axes as text: trace a function of a few parameters, and spell out what the dims of these are.

Leaves that something can leave from are letters, in the order of their first appearance; the same letter is the same
leaf. What is frozen as a whole is its size with a `!`. `(A*B)` is a product, its outer digit first, `(A+B)` a sum.
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


class Function(nn.Module):
    """A function of parameters and numbers; tuples of sizes become parameters, other values attributes."""

    def __init__(self, function: Callable[[Any], Tensor], **values: Any):
        super().__init__()
        self.function = function
        for name, value in values.items():
            is_shape = isinstance(value, tuple)
            setattr(self, name, nn.Parameter(torch.zeros(value, device="meta")) if is_shape else value)

    def forward(self, _: Tensor) -> Tensor:
        return self.function(self).sum()


def trace_function(function: Callable[[Any], Tensor], **values: Any) -> Trace:
    """Trace a function; its result is summed up, so that it is no output that would be frozen."""
    return trace_network(Function(function, **values).eval(), torch.zeros(1, 3, 4, 4, device="meta"))


def solve(trace: Trace, **values: Any) -> Solution:
    """Freeze, in place, what literals and numbers ask for, as the engine does after the trace."""
    numbers: dict[Attribute, int] = {}
    for name, value in values.items():
        if isinstance(value, int):
            numbers[Attribute("", name)] = value
        elif isinstance(value, list):
            numbers.update({Attribute("", name, place): entry for place, entry in enumerate(value)})
    return solve_equations(trace, numbers)


def spell(trace: Trace, *names: str) -> str:
    """Spell out the axes of tensors, by default of all: `A B, (B*2!)`."""
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
    """Why leaves of the parameters are frozen."""
    found = {leaf.frozen for axes in trace.tensors.values() for axis in axes for leaf in leaves(axis) if leaf.size > 1}
    return {reason for reason in found if reason is not None}
