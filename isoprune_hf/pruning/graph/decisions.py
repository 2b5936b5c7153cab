"""Values of tensors by which the code of a network decides what runs, as a mixture of experts selects rows.

A trace records them (`decisions_of`), and the check of a cut repeats them (`Replay`): after a cut all values differ,
and another choice of rows or modules would look like a fault of the cut. Modules that did not run beside others of
their kind may run for other images, so the channels that they share with those are frozen (`freeze_choices`).
"""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from isoprune_hf.pruning.graph.axis import freeze, leaves
from isoprune_hf.pruning.graph.torch_private import OpOverload, aten
from isoprune_hf.pruning.graph.trace import Decision, Trace

_READS = frozenset((aten._local_scalar_dense.default, aten.nonzero.default))
_INDEXED = frozenset((aten.index.Tensor, aten.index_put.default, aten.index_put_.default))
_MASKED = frozenset((aten.masked_select.default,))
_MASK_TYPES = (torch.bool, torch.uint8)


def deciding_tensors(func: OpOverload, args: Sequence[Any]) -> list[Tensor]:
    """Return the tensors of which the values decide the shape or the number that an operation returns."""
    if func in _READS:
        return [args[0]]
    if func in _MASKED:
        return [args[1]]
    if func in _INDEXED:
        return [index for index in args[1] if index is not None and index.dtype in _MASK_TYPES]
    return []


def decision_of(func: OpOverload, tensors: Sequence[Tensor], out: Any, module: str) -> Decision:
    """Return the decision of an operation: its output, or the masks that it reads."""
    values = [out] if func in _READS else tensors
    return Decision(module, tuple(value.clone() if isinstance(value, Tensor) else value for value in values))


class Replay:
    """Repeats the decisions of a trace in another pass.

    Args:
        decisions: The decisions, in order.
    """

    def __init__(self, decisions: Sequence[Decision]):
        self._values: Iterator[tuple[Any, ...]] = iter([each.values for each in decisions if each.values])

    def run(self, func: OpOverload, args: tuple[Any, ...]) -> tuple[tuple[Any, ...], Any]:
        """Return the arguments of a deciding operation as they were in the trace, and its output if it is known."""
        values = next(self._values, None)
        if values is None:
            return args, None
        if func in _READS:
            return args, values[0]
        if func in _MASKED:
            return (args[0], *values, *args[2:]), None
        masks = iter(values)
        indices = [
            index if index is None or index.dtype not in _MASK_TYPES else next(masks, index) for index in args[1]
        ]
        return (args[0], indices, *args[2:]), None


class Choice(NamedTuple):
    """Modules of which only some run, by values."""

    module: str
    idle: str


def freeze_choices(network: nn.Module, trace: Trace) -> None:
    """Freeze the channels of modules beside those that did not run in a network that decides by values, in place.

    Args:
        network: The network of the trace.
        trace: Its trace in eval mode.
    """
    choices = _choices(network, trace)
    for choice in choices:
        prefix = f"{choice.module}." if choice.module else ""
        for name, axes in trace.tensors.items():
            if name.startswith(prefix):
                for leaf in (leaf for axis in axes for leaf in leaves(axis)):
                    freeze(leaf, f"the code decides by values whether {choice.idle} runs")
    if choices:
        trace.notes.append(
            f"left whole: {', '.join(dict.fromkeys(choice.module or 'the model' for choice in choices))}: the code "
            f"decides by values what runs there, and {choices[0].idle} did not run"
        )


def _choices(network: nn.Module, trace: Trace) -> list[Choice]:
    """Return the modules that decide by values, with a module in them that did not run."""
    if not trace.decisions:
        return []
    idle: list[str] = []
    for path, part in network.named_modules():
        names = [f"{path}.{name}" for name, _ in part.named_parameters()]
        is_part = any(path.startswith(f"{other}.") for other in idle)
        if path and names and not is_part and not any(name in trace.tensors for name in names):
            idle.append(path)
    found = []
    for module in dict.fromkeys(decision.module for decision in trace.decisions):
        prefix = f"{module}." if module else ""
        for path in (path for path in idle if path.startswith(prefix)):
            parent = path.rpartition(".")[0]
            has_run = bool(parent) and any(name.startswith(f"{parent}.") for name in trace.tensors)
            found.append(Choice(parent if has_run and parent.startswith(prefix) else module, path))
    return found
