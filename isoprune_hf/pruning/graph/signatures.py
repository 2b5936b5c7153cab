"""Signatures of coupled groups: `list_entries` and `flow_edges`.

Groups with equal signatures form one isomorphic class, within which channels compete. A signature has one entry for
each layer, and the side of the layer, that the channels of a group touch.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from torch import nn

from isoprune_hf.pruning.graph.axis import Axis, leaves
from isoprune_hf.pruning.graph.axis_graph import AxisGraph
from isoprune_hf.pruning.graph.layers import LAYERS, ConvNd, ConvTransposeNd, convolution_settings, is_depthwise
from isoprune_hf.pruning.graph.trace import TracedOp
from isoprune_hf.pruning.groups import Member


class Entry(NamedTuple):
    """One entry of a signature.

    Args:
        owner: Path of the layer, or name of a parameter that belongs to no layer (a loose parameter).
        side: out, in, or depthwise; empty for a loose parameter.
        label: Text of the entry in a paper signature.
        strict: Text of the entry in a strict signature.
    """

    owner: str
    side: str
    label: str
    strict: str


def list_entries(members: Iterable[Member], modules: Mapping[str, nn.Module]) -> list[Entry]:
    """Return one entry for each side of a layer among the members, and for each loose parameter."""
    seen: dict[tuple[str, str], Entry] = {}
    for member in members:
        path, _, leaf = member.parameter.rpartition(".")
        layer = modules[path]
        if not isinstance(layer, LAYERS):
            seen.setdefault((member.parameter, ""), Entry(member.parameter, "", "Parameter", "Parameter"))
            continue
        side = _side(layer, leaf, member.dim)
        label = f"{type(layer).__name__}.{side}"
        seen.setdefault((path, side), Entry(path, side, label, label + convolution_settings(layer)))
    return list(seen.values())


def _side(layer: nn.Module, leaf: str, dim: int) -> str:
    if is_depthwise(layer):
        return "depthwise"
    reads = leaf == "weight" and dim == (0 if isinstance(layer, ConvTransposeNd) else 1)
    return "in" if reads and isinstance(layer, nn.Linear | ConvNd) else "out"


def flow_edges(graph: AxisGraph, entries: Sequence[Entry], axes: Sequence[Axis]) -> str:
    """Return the edges of a strict signature, as `0>1,1>2`.

    There is an edge where channels flow from one entry to another and pass no other entry. Loose parameters only
    begin edges, because the operation that reads one passes its other input on.

    Args:
        graph: The graph of the network.
        entries: Entries of the group.
        axes: Leaves of the group.
    """
    ops = graph.trace.ops
    wanted = set(map(id, axes))
    readers: dict[int, list[int]] = {}
    for number, op in enumerate(ops):
        for source in op.source.ops:
            readers.setdefault(source, []).append(number)
    places = {(entry.owner, entry.side): position for position, entry in enumerate(entries)}
    edges = set()
    for number, op in enumerate(ops):
        begins = _entries_of(op, places, ("out", "depthwise", ""))
        if begins and _carries(op, wanted):
            ends = _entries_after(number, ops, readers, places, wanted)
            edges |= {(begin, end) for begin in begins for end in ends}
    return ",".join(f"{begin}>{end}" for begin, end in sorted(edges))


def _entries_of(op: TracedOp, places: Mapping[tuple[str, str], int], sides: Sequence[str]) -> list[int]:
    """Return the entry of each tensor that an operation reads: that of the first of `sides` that has one."""
    found = []
    for name in op.source.tensors:
        keys = [(name, side) if side == "" else (name.rpartition(".")[0], side) for side in sides]
        found += [places[key] for key in keys if key in places][:1]
    return found


def _entries_after(
    start: int,
    ops: Sequence[TracedOp],
    readers: Mapping[int, Sequence[int]],
    places: Mapping[tuple[str, str], int],
    wanted: set[int],
) -> set[int]:
    """Return the entries that the channels of operation `start` reach first."""
    reached: set[int] = set()
    pending = [start]
    seen = {start}
    while pending:
        for number in readers.get(pending.pop(), ()):
            if number in seen:
                continue
            seen.add(number)
            ends = _entries_of(ops[number], places, ("in", "depthwise", "out"))
            if ends:
                reached |= set(ends)
            elif _carries(ops[number], wanted):
                pending.append(number)
    return reached


def _carries(op: TracedOp, wanted: set[int]) -> bool:
    """Check whether an output of an operation has one of the leaves."""
    return any(id(leaf) in wanted for axes in op.outputs for axis in axes for leaf in leaves(axis))
