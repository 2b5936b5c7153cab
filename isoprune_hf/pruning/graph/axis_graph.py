"""The axis graph of a network: which leaves are free, which of them are heads and dims of heads, which are linked."""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import nn

from isoprune_hf.errors import UnsupportedArchitectureError
from isoprune_hf.pruning.graph.axis import Axis, find, freeze, unify
from isoprune_hf.pruning.graph.cells import Cell, cells
from isoprune_hf.pruning.graph.copying import blank_image, copy_modules, copy_shapes
from isoprune_hf.pruning.graph.equations import Solution, freeze_compared, solve_equations
from isoprune_hf.pruning.graph.trace import Trace
from isoprune_hf.pruning.graph.traced_int import Attribute
from isoprune_hf.pruning.graph.tracer import trace_network

# What a network may raise where its forward pass reads values, which the meta device does not have.
RUN_ERRORS = (RuntimeError, ValueError, TypeError, LookupError, AttributeError, AssertionError, ArithmeticError)
_SEQUENCES = tuple, list


@dataclass(frozen=True, eq=False)
class AxisGraph:
    """What can leave a network.

    Args:
        trace: The forward pass that has shown it.
        solution: Numbers of modules that follow from sizes, and linked leaves.
        heads: Dim of the heads of an attention -> its heads: leaves, by identity.
        on_meta: The network runs on the meta device; otherwise its forward pass reads values.
    """

    trace: Trace
    solution: Solution
    heads: dict[int, Axis]
    on_meta: bool

    @cached_property
    def members(self) -> dict[int, dict[tuple[str, int], list[Cell]]]:
        """Free leaf, by identity -> (tensor, dim) -> the elements that belong to it."""
        known: dict[int, list[Cell]] = {}
        found: dict[int, dict[tuple[str, int], list[Cell]]] = {}
        for name, axes in self.trace.tensors.items():
            for dim, axis in enumerate(axes):
                for cell in cells(axis, known):
                    for leaf in cell.labels:
                        found.setdefault(leaf, {}).setdefault((name, dim), []).append(cell)
        return found

    def free(self) -> dict[int, Axis]:
        """Leaves that lie in parameters or buffers and may lose elements, by identity, in the order of the trace."""
        found: dict[int, Axis] = {}
        for axes in self.trace.tensors.values():
            for axis in axes:
                for path in paths(axis):
                    found.update((id(leaf), leaf) for leaf in path)
        return found


def follow_axes(base: nn.Module, image_size: Sequence[int]) -> AxisGraph:
    """Trace a network; reads shapes only, unless its forward pass depends on values, and leaves it untouched.

    Raises:
        UnsupportedArchitectureError: The network does not run on an image of `image_size`.
    """
    on_meta = True
    try:
        network = copy_shapes(base, dtype=torch.float32).eval()
        trace = trace_network(network, blank_image(network, image_size))
    except RUN_ERRORS as error:
        network, trace = _trace_real(base, image_size, error)
        on_meta = False
    values = _numbers(network)
    while True:
        solution = solve_equations(trace, values)
        heads = _find_heads(trace, solution)
        if heads is not None and not freeze_compared(trace, solution):
            return AxisGraph(trace, solution, heads, on_meta)


def _trace_real(base: nn.Module, image_size: Sequence[int], on_meta: Exception) -> tuple[nn.Module, Trace]:
    if any(parameter.is_meta for parameter in base.parameters()):
        raise _does_not_run(base, on_meta) from on_meta
    try:
        network = copy_modules(base, torch.clone, with_hooks=False).eval()
        return network, trace_network(network, blank_image(network, image_size))
    except RUN_ERRORS as error:
        raise _does_not_run(base, error) from error


def _does_not_run(base: nn.Module, error: Exception) -> UnsupportedArchitectureError:
    reason = " ".join(str(error).split())
    return UnsupportedArchitectureError(f"{type(base).__name__} does not run ({type(error).__name__}: {reason:.300})")


def _numbers(network: nn.Module) -> dict[Attribute, int]:
    """The integers that modules keep."""
    numbers: dict[Attribute, int] = {}
    for path, module in network.named_modules():
        for name, value in vars(module).items():
            if isinstance(value, int):
                numbers[Attribute(path, name)] = int(value)
            elif isinstance(value, _SEQUENCES) and all(isinstance(entry, int) for entry in value):
                numbers.update((Attribute(path, name, at), int(entry)) for at, entry in enumerate(value))
    return numbers


def paths(axis: Axis) -> Iterator[tuple[Axis, ...]]:
    """Yield the free leaves that each kind of element of an axis belongs to, the outermost first."""
    axis = find(axis)
    if axis.kind == "leaf":
        yield () if axis.frozen is not None or axis.size == 1 else (axis,)
    elif axis.kind == "sum":
        for part in axis.parts:
            yield from paths(part)
    else:
        for choice in itertools.product(*(list(paths(part)) for part in axis.parts)):
            yield tuple(leaf for path in choice for leaf in path)


def _find_heads(trace: Trace, solution: Solution) -> dict[int, Axis] | None:
    """Pair dims with heads; None where something had to be frozen or tied for that, so that all changes."""
    partners: dict[int, dict[int, Axis]] = {}
    owners: dict[int, dict[int, Axis]] = {}
    by_id: dict[int, Axis] = {}
    for *outer, dim in _mixed_paths(trace):
        held = [leaf for leaf in outer if not leaf.is_batch or leaf is dim]
        if len(outer) > 1:  # of several, copies stay before heads do
            held = held or [leaf for leaf in outer if leaf.is_copy] or outer
        if held:
            freeze(held[0], "it is a part of channels that leave by another part")
            return None
        (head,) = outer
        by_id[id(head)], by_id[id(dim)] = head, dim
        partners.setdefault(id(head), {})[id(dim)] = dim
        owners.setdefault(id(dim), {})[id(head)] = head
    for head, dims in partners.items():
        sizes = {dim.size for dim in dims.values()}
        if len(dims) > 1 and len(sizes) == 1 and not dims.keys() & partners.keys():
            first, *others = dims.values()
            for other in others:  # the same dims leave queries, keys and values
                unify(first, other)
            return None
        if len(dims) > 1:
            freeze(by_id[head], "its dims are of different kinds")
            return None
    linked = set().union(*solution.links)
    for dim, heads in owners.items():
        if len(heads) > 1 or dim in partners or linked & {dim, *heads}:
            for head in heads.values():
                freeze(head, "its dims leave with other widths")
            return None
    return {dim: next(iter(heads.values())) for dim, heads in owners.items()}


def _mixed_paths(trace: Trace) -> list[tuple[Axis, ...]]:
    """Paths of more than one leaf."""
    seen: set[int] = set()
    found: dict[tuple[int, ...], tuple[Axis, ...]] = {}
    for axes in trace.tensors.values():
        for axis in map(find, axes):
            if axis.kind != "leaf" and id(axis) not in seen:
                seen.add(id(axis))
                found.update((tuple(map(id, path)), path) for path in paths(axis) if len(path) > 1)
    return list(found.values())
