"""The axis graph of a network: `build_axis_graph` traces it and finds its free, linked and head leaves."""

import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import nn

from isoprune_hf.checkpoint.difference import number_tables
from isoprune_hf.errors import UnsupportedArchitectureError
from isoprune_hf.pruning.graph.axis import Axis, find, freeze, leaves
from isoprune_hf.pruning.graph.cells import Cell, find_cells
from isoprune_hf.pruning.graph.comparisons import freeze_compared
from isoprune_hf.pruning.graph.copying import blank_image, copy_modules, copy_shapes
from isoprune_hf.pruning.graph.decisions import freeze_choices
from isoprune_hf.pruning.graph.equations import Solution, solve_equations
from isoprune_hf.pruning.graph.trace import Trace
from isoprune_hf.pruning.graph.traced_int import Attribute
from isoprune_hf.pruning.graph.tracer import FORWARD_ERRORS, trace_network
from isoprune_hf.pruning.graph.train_mode import trace_train_mode
from isoprune_hf.pruning.graph.unify import unify

_COLLECTIONS = (tuple, list)


@dataclass(frozen=True, eq=False)
class AxisGraph:
    """The axes of a network and the leaves that can be pruned.

    Args:
        trace: The forward pass that the graph was found by.
        solution: The attributes that depend on sizes, and the linked leaves.
        heads: Leaf of head dims, by identity -> the leaf of their heads.
        on_meta: The network runs on the meta device; else its forward pass reads values.
    """

    trace: Trace
    solution: Solution
    heads: dict[int, Axis]
    on_meta: bool

    @cached_property
    def members(self) -> dict[int, dict[tuple[str, int], list[Cell]]]:
        """Free leaf, by identity -> (tensor, dim) -> the elements that belong to the leaf."""
        known: dict[int, list[Cell]] = {}
        found: dict[int, dict[tuple[str, int], list[Cell]]] = {}
        for name, axes in self.trace.tensors.items():
            for dim, axis in enumerate(axes):
                for cell in find_cells(axis, known):
                    for leaf in cell.labels:
                        found.setdefault(leaf, {}).setdefault((name, dim), []).append(cell)
        return found

    def free_leaves(self) -> dict[int, Axis]:
        """Return the free leaves of parameters and buffers, by identity, in the order of the trace."""
        found: dict[int, Axis] = {}
        for axes in self.trace.tensors.values():
            for axis in axes:
                for path in leaf_paths(axis):
                    found.update((id(leaf), leaf) for leaf in path)
        return found


def build_axis_graph(base: nn.Module, image_size: Sequence[int]) -> AxisGraph:
    """Trace a network and build its axis graph; leaves the network untouched.

    The network runs on the meta device, without values. Only if that fails does a copy run with values.

    Args:
        base: The network.
        image_size: Of one image, (C, H, W).

    Raises:
        UnsupportedArchitectureError: The network does not run on an image of `image_size`.
    """
    on_meta = True
    try:
        network = copy_shapes(base, dtype=torch.float32).eval()
        trace = trace_network(network, blank_image(network, image_size))
    except FORWARD_ERRORS as error:
        network, trace = _trace_with_values(base, image_size, error)
        on_meta = False
    freeze_choices(network, trace)
    values = _integer_attributes(network)
    trace_train_mode(network, trace, blank_image(network, image_size))
    while True:
        # Freezing or tying a leaf changes which leaves are linked and which are heads, so both are found again.
        # Every repetition reduces the number of free leaves, so the loop ends.
        solution = solve_equations(trace, values)
        paths = _composite_paths(trace)
        if _freeze_trained_factors(paths, trace):
            continue
        if not _resolve_head_conflict(paths, solution) and not freeze_compared(trace, solution):
            return AxisGraph(trace, solution, {id(dim): head for head, dim in paths}, on_meta)


def _trace_with_values(base: nn.Module, image_size: Sequence[int], on_meta: Exception) -> tuple[nn.Module, Trace]:
    """Trace a copy with weights.

    Args:
        base: The network.
        image_size: Of one image, (C, H, W).
        on_meta: The error that the network raised on the meta device.
    """
    if any(parameter.is_meta for parameter in base.parameters()):
        raise _does_not_run(base, on_meta) from on_meta
    try:
        network = copy_modules(base, torch.clone, with_hooks=False).eval()
        return network, trace_network(network, blank_image(network, image_size))
    except FORWARD_ERRORS as error:
        raise _does_not_run(base, error) from error


def _does_not_run(base: nn.Module, error: Exception) -> UnsupportedArchitectureError:
    reason = " ".join(str(error).split())
    return UnsupportedArchitectureError(f"{type(base).__name__} does not run ({type(error).__name__}: {reason:.300})")


def _integer_attributes(network: nn.Module) -> dict[Attribute, int]:
    """Return the integers that modules and their configs keep, entries of tuples and lists included."""
    found: dict[Attribute, int] = {}
    for (path, owner), table in number_tables(network).items():
        for name, value in table.items():
            full = f"{owner}.{name}" if owner else str(name)
            if isinstance(value, int):
                found[Attribute(path, full)] = int(value)
            elif isinstance(value, _COLLECTIONS) and all(isinstance(entry, int) for entry in value):
                found.update((Attribute(path, full, at), int(entry)) for at, entry in enumerate(value))
    return found


def leaf_paths(axis: Axis) -> Iterator[tuple[Axis, ...]]:
    """Yield, for each kind of element of an axis, the free leaves that such an element belongs to, outermost first.

    An axis of heads x dims yields (heads, dims); a concatenation yields the paths of all its pieces.
    """
    axis = find(axis)
    if axis.kind == "leaf":
        yield () if axis.frozen is not None or axis.size == 1 else (axis,)
    elif axis.kind == "sum":
        for part in axis.parts:
            yield from leaf_paths(part)
    else:
        for choice in itertools.product(*(list(leaf_paths(part)) for part in axis.parts)):
            yield tuple(leaf for path in choice for leaf in path)


def _composite_paths(trace: Trace) -> list[tuple[Axis, ...]]:
    """Return the different paths of more than one leaf."""
    seen: set[int] = set()
    found: dict[tuple[int, ...], tuple[Axis, ...]] = {}
    for axes in trace.tensors.values():
        for axis in map(find, axes):
            if axis.kind != "leaf" and id(axis) not in seen:
                seen.add(id(axis))
                found.update((tuple(map(id, path)), path) for path in leaf_paths(axis) if len(path) > 1)
    return list(found.values())


def _freeze_trained_factors(paths: Sequence[tuple[Axis, ...]], trace: Trace) -> bool:
    """Freeze, in place, heads and their dims that a part reads which only train mode runs; returns whether any is."""
    read = {id(leaf) for name in trace.train_only for axis in trace.tensors[name] for leaf in leaves(axis)}
    found = [leaf for path in paths if any(id(leaf) in read for leaf in path) for leaf in path]
    for leaf in found:
        freeze(leaf, "a part that only train mode runs reads it")
    return bool(found)


def _resolve_head_conflict(paths: Sequence[tuple[Axis, ...]], solution: Solution) -> bool:
    """Freeze or tie, in place, a leaf that keeps the paths from being pairs of heads and their dims.

    Returns:
        Whether there was such a leaf. If not, each path is (heads, dims), and each leaf of dims has one leaf of heads.
    """
    return (
        any(_freeze_outer_factor(path) for path in paths)
        or _freeze_common_dims(paths, solution)
        or _unite_dims_of_heads(paths)
        or _freeze_shared_dims(paths, solution)
    )


def _freeze_outer_factor(path: tuple[Axis, ...]) -> bool:
    """Freeze an outer leaf that is not a single leaf of heads; returns whether there was one."""
    *outer, dim = path
    candidates = [leaf for leaf in outer if not leaf.is_batch or leaf is dim]
    if len(outer) > 1 and not candidates:  # several leaves of heads: freeze a copy rather than heads
        candidates = [leaf for leaf in outer if leaf.is_copy] or outer
    if candidates:
        freeze(candidates[0], "its channels are pruned along another factor")
    return bool(candidates)


def _unite_dims_of_heads(paths: Sequence[tuple[Axis, ...]]) -> bool:
    """Tie the different dims of the same heads, or freeze the heads; returns whether there were any."""
    dims_of: dict[int, dict[int, Axis]] = {}
    for head, dim in paths:
        dims_of.setdefault(id(head), {})[id(dim)] = dim
    for head, _ in paths:
        first, *others = dims_of[id(head)].values()
        if not others:
            continue
        if all(dim.size == first.size for dim in others) and not dims_of[id(head)].keys() & dims_of.keys():
            for other in others:  # the same dims are pruned in queries, keys and values
                unify(first, other)
        else:
            freeze(head, "its dims are of different kinds")
        return True
    return False


def _freeze_common_dims(paths: Sequence[tuple[Axis, ...]], solution: Solution) -> bool:
    """Freeze dims that several attentions have in common, and nothing else; returns whether there were any.

    The frequencies of rotary positions are such dims. The heads of each attention stay free: there are more of them,
    and each attention can lose its own.
    """
    heads_of = _heads_of_dims(paths)
    links = [{dim} for dim in heads_of.keys() - set().union(*solution.links)] + solution.links
    common = [
        link for link in links if link <= heads_of.keys() and len({head for dim in link for head in heads_of[dim]}) > 1
    ]
    for _, dim in paths:
        if any(id(dim) in link for link in common):
            freeze(dim, "several attentions have its dims in common")
    return bool(common)


def _heads_of_dims(paths: Iterable[tuple[Axis, ...]]) -> dict[int, dict[int, Axis]]:
    """Return the leaves of heads that each leaf of dims belongs to; all by identity."""
    found: dict[int, dict[int, Axis]] = {}
    for head, dim in paths:
        found.setdefault(id(dim), {})[id(head)] = head
    return found


def _freeze_shared_dims(paths: Sequence[tuple[Axis, ...]], solution: Solution) -> bool:
    """Freeze the heads of dims that belong to several heads, or that are linked; returns whether there were any."""
    heads_of = _heads_of_dims(paths)
    all_heads = {id(head) for head, _ in paths}
    linked: set[int] = set().union(*solution.links)
    for dim_id, heads in heads_of.items():
        if len(heads) > 1 or dim_id in all_heads or linked & {dim_id, *heads}:
            for head in heads.values():
                freeze(head, "its dims are tied to other widths")
            return True
    return False
