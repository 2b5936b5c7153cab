"""Signatures: what a coupled group is built of, so that equal groups can compete."""

from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from torch import nn

from isoprune_hf.pruning.graph.axis import Axis, leaves
from isoprune_hf.pruning.graph.axis_graph import AxisGraph
from isoprune_hf.pruning.graph.layers import LAYERS, ConvNd, ConvTransposeNd, is_depthwise
from isoprune_hf.pruning.graph.trace import Step
from isoprune_hf.pruning.groups import Member


class Entry(NamedTuple):
    """One entry of a signature.

    Args:
        owner: Path of the layer, or name of the loose parameter.
        side: out, in, or depthwise; empty for a loose parameter.
        label: What the paper's signature says.
        strict: What the strict one says.
    """

    owner: str
    side: str
    label: str
    strict: str


def list_entries(members: Iterable[Member], modules: Mapping[str, nn.Module]) -> list[Entry]:
    """One entry for each side of a layer that is touched, and for each loose parameter."""
    seen: dict[tuple[str, str], Entry] = {}
    for member in members:
        path, _, leaf = member.parameter.rpartition(".")
        layer = modules[path]
        if not isinstance(layer, LAYERS):
            seen.setdefault((member.parameter, ""), Entry(member.parameter, "", "Parameter", "Parameter"))
            continue
        side = _side(layer, leaf, member.dim)
        label = f"{type(layer).__name__}.{side}"
        seen.setdefault((path, side), Entry(path, side, label, label + _build(layer)))
    return list(seen.values())


def _side(layer: nn.Module, leaf: str, dim: int) -> str:
    if is_depthwise(layer):
        return "depthwise"
    reads = leaf == "weight" and dim == (0 if isinstance(layer, ConvTransposeNd) else 1)
    return "in" if reads and isinstance(layer, nn.Linear | ConvNd) else "out"


def _build(layer: nn.Module) -> str:
    if not isinstance(layer, ConvNd):
        return ""
    kernel, stride = ("x".join(map(str, sizes)) for sizes in (layer.kernel_size, layer.stride))
    return f"(kernel {kernel}, stride {stride}, groups {'all' if is_depthwise(layer) else layer.groups})"


def edges(graph: AxisGraph, entries: Sequence[Entry], axes: Sequence[Axis]) -> str:
    """Pairs of entries that are joined without another of them in between, as `0>1,1>2`.

    Loose parameters only begin an edge: the operation that reads them hands its input on.
    """
    steps, wanted = graph.trace.steps, set(map(id, axes))
    readers: dict[int, list[int]] = {}
    for number, step in enumerate(steps):
        for source in step.source.steps:
            readers.setdefault(source, []).append(number)
    place = {(entry.owner, entry.side): position for position, entry in enumerate(entries)}
    found = set()
    for number, step in enumerate(steps):
        begins = _entries_of(step, place, ("out", "depthwise", ""))
        if begins and _holds(step, wanted):
            found |= {(begin, end) for begin in begins for end in _reached(number, steps, readers, place, wanted)}
    return ",".join(f"{begin}>{end}" for begin, end in sorted(found))


def _entries_of(step: Step, place: Mapping[tuple[str, str], int], sides: Sequence[str]) -> list[int]:
    """Entries of the tensors that a step reads, of the first of the sides that each has."""
    found = []
    for name in step.source.tensors:
        keys = [(name, side) if side == "" else (name.rpartition(".")[0], side) for side in sides]
        found += [place[key] for key in keys if key in place][:1]
    return found


def _reached(
    start: int,
    steps: Sequence[Step],
    readers: Mapping[int, Sequence[int]],
    place: Mapping[tuple[str, str], int],
    wanted: set[int],
) -> set[int]:
    """Entries where channels of a step arrive."""
    reached, pending, seen = set(), [start], {start}
    while pending:
        for number in readers.get(pending.pop(), ()):
            if number in seen:
                continue
            seen.add(number)
            ends = _entries_of(steps[number], place, ("in", "depthwise", "out"))
            if ends:
                reached |= set(ends)
            elif _holds(steps[number], wanted):
                pending.append(number)
    return reached


def _holds(step: Step, wanted: set[int]) -> bool:
    """Whether the channels lie in an output."""
    return any(id(leaf) in wanted for axes in step.outputs for axis in axes for leaf in leaves(axis))
