"""Rules of pointwise operations, in which each output element comes from the same element of each input.

Operations that torch tags as pointwise need no entry here: `tracer` applies `pointwise` to all of them.
"""

from collections.abc import Iterable, Sequence
from typing import Any

from torch import Tensor

from isoprune_hf.pruning.graph.rules.registry import RuleTable
from isoprune_hf.pruning.graph.trace import ONE, Axes, Trace

rule = RuleTable()


def broadcast(trace: Trace, tensors: Iterable[Tensor], shape: Sequence[int]) -> Axes:
    """Tie the axes of tensors that are broadcast to a shape, and return the axes of the result."""
    rows = [trace.axes(tensor)[::-1] for tensor in tensors]
    result = []
    for at, size in enumerate(reversed(shape)):
        aligned = [row[at] for row in rows if at < len(row) and row[at].size == size]
        result.append(trace.tie(aligned) if size != 1 and aligned else ONE)
    return tuple(result[::-1])


@rule("copy_", "where", "masked_fill", "_prelu_kernel", "dropout", "hardswish", "hardsigmoid")
def pointwise(trace: Trace, out: Tensor, *args: Any, **kwargs: Any) -> Axes:
    """Return the axes of an output to whose shape all tensors among the arguments are broadcast."""
    return broadcast(trace, [arg for arg in (*args, *kwargs.values()) if isinstance(arg, Tensor)], out.shape)
