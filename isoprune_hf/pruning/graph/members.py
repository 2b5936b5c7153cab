"""The coupled groups of an axis graph: `couple_axes` names the elements that belong to each free leaf."""

import itertools
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Literal

import numpy as np
from torch import nn

from isoprune_hf.pruning.graph.axis import Axis, find, leaves
from isoprune_hf.pruning.graph.axis_graph import AxisGraph
from isoprune_hf.pruning.graph.cells import Cell, unit_positions
from isoprune_hf.pruning.graph.layers import LAYERS, ConvTransposeNd
from isoprune_hf.pruning.graph.signatures import Entry, flow_edges, list_entries
from isoprune_hf.pruning.graph.torch_private import own_buffers, own_parameters
from isoprune_hf.pruning.groups import CoupledGroup, Member

_Place = tuple[str, int]  # a tensor and one of its dims


def couple_axes(graph: AxisGraph, base: nn.Module, signature: Literal["paper", "strict"]) -> tuple[CoupledGroup, ...]:
    """Build the coupled groups of a network, in the order of `named_modules`."""
    builder = _GroupBuilder(graph, base, signature)
    free = graph.free_leaves()
    found = []
    done: set[int] = set()
    for leaf, axis in free.items():
        if leaf in done or leaf in graph.heads:
            continue
        dims = [dim for dim, head in graph.heads.items() if find(head) is axis]
        link = next((link for link in graph.solution.links if leaf in link), None)
        own = [axis]
        if dims:
            own.append(free[dims[0]])
            group: CoupledGroup | None = builder.attention_group(*own)
        elif link:
            own = [free[other] for other in free if other in link]
            group = builder.linked_group(own)
            done |= link
        else:
            group = builder.single_group(axis)
        if group is not None:
            found.append(replace(group, sliding=_sliding(graph, own)))
    return builder.sort_and_number(found)


def _sliding(graph: AxisGraph, own: Iterable[Axis]) -> tuple[str, ...]:
    """Return the weights of the convolutions that run along any of these leaves."""
    ids = set(map(id, own))
    names = {
        name for slide in graph.trace.slides if ids & set(map(id, leaves(slide.channels))) for name in slide.weights
    }
    return tuple(sorted(names))


class _GroupBuilder:
    """Builds groups from leaves, with the modules of the network and their order."""

    def __init__(self, graph: AxisGraph, base: nn.Module, signature: Literal["paper", "strict"]):
        self.graph = graph
        self.signature = signature
        self.members = {
            leaf: {place: cells for place, cells in found.items() if place[0] not in graph.trace.train_only}
            for leaf, found in graph.members.items()
        }
        self.modules = dict(base.named_modules())
        self.order = {name: position for position, name in enumerate(self.modules)}
        # Leaf -> the module that multiplies two activations along it, which makes it the dims of an attention.
        self.attended = {
            id(leaf): product.module
            for product in graph.trace.matrix_products
            if not product.has_weight
            for axis in product.sizes[-2:]
            for leaf in leaves(axis)
            if leaf.frozen is None
        }

    def single_group(self, leaf: Axis) -> CoupledGroup | None:
        """Build the group of one leaf; None if no layer reads its channels."""
        return self._group([leaf], leaf.size)

    def linked_group(self, linked: list[Axis]) -> CoupledGroup | None:
        """Build the group of linked leaves; each unit has an equal share of each leaf. None if no layer reads them."""
        return self._group(linked, int(np.gcd.reduce([leaf.size for leaf in linked])))

    def _group(self, own: list[Axis], units: int) -> CoupledGroup | None:
        index: dict[_Place, list[np.ndarray]] = {}
        for leaf in own:
            for place, found in self.members.get(id(leaf), {}).items():
                positions = unit_positions(found, {id(leaf): 1}, leaf.size)
                index.setdefault(place, []).append(positions.reshape(units, -1))
        members = self._sorted_members({place: np.concatenate(parts, axis=1) for place, parts in index.items()})
        entries = list_entries(members, self.modules)
        if all(entry.side == "out" for entry in entries):
            return None
        inside = f"{self.attended.get(id(own[0]), '-')}."
        if len(own) == 1 and all(member.parameter.startswith(inside) for member in members):
            # An attention with a single head, or with frozen heads: its dims compete with those of other attentions.
            heads = int(min(member.index.shape[1] for member in members) == 1)
            return CoupledGroup(_common_path(_owners(members)), _attention_signature(entries), units, members, heads)
        return CoupledGroup(self._writer(members), self._sign(entries, own), units, members)

    def _sign(self, entries: list[Entry], leaves: list[Axis]) -> str:
        if self.signature == "paper":
            return "|".join(entry.label for entry in entries)
        return "|".join(entry.strict for entry in entries) + "#" + flow_edges(self.graph, entries, leaves)

    def attention_group(self, head: Axis, dim: Axis) -> CoupledGroup:
        """Build the group of heads and their dims."""
        shared, head_only, dim_only = self._split_members(head, dim)
        channels = head.size * dim.size
        strides = {id(head): dim.size, id(dim): 1}
        members = self._sorted_members(
            {place: unit_positions(found, strides, channels) for place, found in shared.items()}
        )
        head_members, dim_members = (
            self._sorted_members(
                {place: unit_positions(found, {id(leaf): 1}, leaf.size) for place, found in own.items()}
            )
            for leaf, own in ((head, head_only), (dim, dim_only))
        )
        everything = (*members, *head_members, *dim_members)
        signature = _attention_signature(list_entries(everything, self.modules))
        path = _common_path(set(_owners(everything)))
        return CoupledGroup(path, signature, channels, members, head.size, head_members, dim_members)

    def _split_members(
        self, head: Axis, dim: Axis
    ) -> tuple[dict[_Place, list[Cell]], dict[_Place, list[Cell]], dict[_Place, list[Cell]]]:
        """Return the cells of both leaves, of the heads only, and of the dims only."""
        shared: dict[_Place, list[Cell]] = {}
        head_only: dict[_Place, list[Cell]] = {}
        dim_only: dict[_Place, list[Cell]] = {}
        for place, found in self.members[id(head)].items():
            for cell in found:
                (shared if id(dim) in cell.labels else head_only).setdefault(place, []).append(cell)
        for place, found in self.members[id(dim)].items():
            for cell in found:
                if id(head) not in cell.labels:
                    dim_only.setdefault(place, []).append(cell)
        return shared, head_only, dim_only

    def _sorted_members(self, index: Mapping[_Place, np.ndarray]) -> tuple[Member, ...]:
        """Return members by module, then by dim for layers, then by the order of a module's tensors."""

        def rank(place: _Place) -> tuple[int, int, int]:
            name, dim = place
            owner = name.rpartition(".")[0]
            return self.order[owner], dim if isinstance(self.modules[owner], LAYERS) else 0, self._tensor_rank(name)

        return tuple(Member(name, dim, index[name, dim]) for name, dim in sorted(index, key=rank))

    def _tensor_rank(self, name: str) -> int:
        path, _, leaf = name.rpartition(".")
        names = [*own_parameters(self.modules[path]), *own_buffers(self.modules[path])]
        return names.index(leaf) if leaf in names else len(names)

    def _writer(self, members: Iterable[Member]) -> str:
        """Return the first layer that writes the channels, else the first module that has them."""
        members = list(members)
        for member in members:
            path, _, leaf = member.parameter.rpartition(".")
            layer = self.modules[path]
            dim = 1 if isinstance(layer, ConvTransposeNd) else 0
            if isinstance(layer, LAYERS) and leaf == "weight" and member.dim == dim:
                return path
        return members[0].parameter.rpartition(".")[0] or members[0].parameter

    def sort_and_number(self, groups: list[CoupledGroup]) -> tuple[CoupledGroup, ...]:
        """Sort groups by module; the second and later groups of a module get a number behind their names."""
        count: dict[str, int] = {}
        named = []
        for group in sorted(groups, key=lambda group: self.order.get(group.name, -1)):
            count[group.name] = count.get(group.name, 0) + 1
            number = count[group.name]
            named.append(group if number == 1 else replace(group, name=f"{group.name}:{number}"))
        return tuple(named)


def _attention_signature(entries: Iterable[Entry]) -> str:
    return "Attention:" + "|".join(entry.label for entry in entries)


def _owners(members: Iterable[Member]) -> list[str]:
    return [member.parameter.rpartition(".")[0] for member in members]


def _common_path(paths: Iterable[str]) -> str:
    """Return the path of the innermost module that contains all of these modules."""
    shared = itertools.takewhile(
        lambda names: len(set(names)) == 1, zip(*(path.split(".") for path in paths), strict=False)
    )
    return ".".join(names[0] for names in shared)
