"""The sizes of matrix products as functions of the widths of groups: `leaf_ties` and `widths_of`.

The groups may come from any engine; a leaf is matched to a group by the elements that belong to both.
"""

from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple

import numpy as np

from isoprune_hf.pruning.graph.axis import Axis, factors
from isoprune_hf.pruning.graph.axis_graph import AxisGraph
from isoprune_hf.pruning.graph.polynomial import size_polynomial
from isoprune_hf.pruning.groups import CoupledGroup, Member

Unit = Literal["channel", "head", "dim"]


class Tie(NamedTuple):
    """The elements of a size that are removed with each unit of a group.

    Args:
        group: Name of the group.
        elements: Elements for each unit.
        unit: A channel, a whole head, or a dim of all heads.
    """

    group: str
    elements: int
    unit: Unit


class Width(NamedTuple):
    """A size as a linear function of the numbers of units that are kept.

    Args:
        size: The size before any cut.
        ties: The groups that it depends on.
    """

    size: int
    ties: tuple[Tie, ...] = ()


class _Owner(NamedTuple):
    """Elements of a dim that are units of a group."""

    positions: np.ndarray
    group: CoupledGroup
    unit: Unit


def leaf_ties(graph: AxisGraph, groups: Sequence[CoupledGroup]) -> dict[int, Tie]:
    """Return leaf, by identity -> its tie to a group; leaves of no group are left out."""
    owners: dict[tuple[str, int], list[_Owner]] = {}
    for group in groups:
        for unit, members in _members_by_unit(group).items():
            for member in members:
                owners.setdefault((member.parameter, member.dim), []).append(_Owner(member.index, group, unit))
    ties: dict[int, Tie] = {}
    for leaf, found in graph.members.items():
        for place, cells in found.items():
            labels = cells[0].labels[leaf]
            first = cells[0].positions[np.argmin(labels)]
            owner = next((owner for owner in owners.get(place, ()) if (owner.positions == first).any()), None)
            if owner is not None:
                ties[leaf] = _tie(graph, leaf, labels, owner)
                break
    return ties


def _members_by_unit(group: CoupledGroup) -> dict[Unit, tuple[Member, ...]]:
    return {"channel": group.members, "head": group.head_members, "dim": group.dim_members}


def _tie(graph: AxisGraph, leaf: int, labels: np.ndarray, owner: _Owner) -> Tie:
    size = int(labels.max()) + 1
    group = owner.group
    if not group.num_heads:
        return Tie(group.name, size // group.channels, "channel")
    if owner.unit != "channel":
        return Tie(group.name, 1, owner.unit)
    heads = {id(head) for head in graph.heads.values()}
    is_head = leaf in heads if leaf in heads or leaf in graph.heads else size == group.num_heads
    return Tie(group.name, 1, "head" if is_head else "dim")


def widths_of(axis: Axis, ties: Mapping[int, Tie]) -> list[Width] | None:
    """Return the factors of a size, each a linear function of widths; None if there are no such factors."""
    found = []
    for factor in factors(axis):
        width = _width(factor, ties)
        if width is None:
            return None
        found.append(width)
    return found


def _width(factor: Axis, ties: Mapping[int, Tie]) -> Width | None:
    by_id: dict[int, Axis] = {}
    total: dict[tuple[str, Unit], int] = {}
    for monomial, count in size_polynomial(factor, by_id).items():
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
    return Width(factor.size, tuple(Tie(group, count, unit) for (group, unit), count in total.items()))
