"""Which units of which groups the free leaves are, whoever has found the groups."""

from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple

import numpy as np

from isoprune_hf.pruning.graph.axis import Axis, digits
from isoprune_hf.pruning.graph.axis_graph import AxisGraph
from isoprune_hf.pruning.graph.equations import size_polynomial
from isoprune_hf.pruning.groups import CoupledGroup

Unit = Literal["channel", "head", "dim"]


class Tie(NamedTuple):
    """Elements that leave with each unit of a group: a channel, a whole head, or a dim of all heads."""

    group: str
    elements: int
    unit: Unit


class Width(NamedTuple):
    """A size as a function of what leaves: what it is, and what ties it to groups."""

    size: int
    ties: tuple[Tie, ...] = ()


def leaf_ties(graph: AxisGraph, groups: Sequence[CoupledGroup]) -> dict[int, Tie]:
    """Leaf, by identity -> how it hangs on a group; leaves of no group are left out."""
    owners: dict[tuple[str, int], list[tuple[np.ndarray, CoupledGroup, Unit]]] = {}
    for group in groups:
        kinds = (("channel", group.members), ("head", group.head_members), ("dim", group.dim_members))
        for unit, members in kinds:
            for member in members:
                owners.setdefault((member.parameter, member.dim), []).append((member.index, group, unit))
    ties: dict[int, Tie] = {}
    for leaf, found in graph.members.items():
        for key, parts in found.items():
            cell = parts[0]
            own = cell.positions[np.argmin(cell.labels[leaf])]
            held = [(group, unit) for index, group, unit in owners.get(key, ()) if (index == own).any()]
            if held:
                ties[leaf] = _tie(graph, leaf, cell.labels[leaf], *held[0])
                break
    return ties


def _tie(graph: AxisGraph, leaf: int, labels: np.ndarray, group: CoupledGroup, unit: Unit) -> Tie:
    size = int(labels.max()) + 1
    if not group.num_heads:
        return Tie(group.name, size // group.channels, "channel")
    if unit != "channel":
        return Tie(group.name, 1, unit)
    heads = {id(head) for head in graph.heads.values()}
    is_head = leaf in heads if leaf in heads or leaf in graph.heads else size == group.num_heads
    return Tie(group.name, 1, "head" if is_head else "dim")


def widths_of(axis: Axis, ties: Mapping[int, Tie]) -> list[Width] | None:
    """A size as factors that each depend on what leaves linearly; None where it cannot be written so."""
    found = []
    for digit in digits(axis):
        width = _width(digit, ties)
        if width is None:
            return None
        found.append(width)
    return found


def _width(digit: Axis, ties: Mapping[int, Tie]) -> Width | None:
    by_id: dict[int, Axis] = {}
    total: dict[tuple[str, Unit], int] = {}
    for monomial, count in size_polynomial(digit, by_id).items():
        tied = [ties[leaf] for leaf in monomial if leaf in ties]
        count *= int(np.prod([by_id[leaf].size for leaf in monomial if leaf not in ties], dtype=np.int64))
        if len(tied) == 1:
            key = tied[0].group, tied[0].unit
            total[key] = total.get(key, 0) + count * tied[0].elements
        elif len(tied) == 2 and tied[0].group == tied[1].group and {tied[0].unit, tied[1].unit} == {"head", "dim"}:
            key = tied[0].group, "channel"
            total[key] = total.get(key, 0) + count
        elif tied:
            return None
    return Width(digit.size, tuple(Tie(group, count, unit) for (group, unit), count in total.items()))
