"""From the axis graph to coupled groups: which elements of which tensors belong to each free leaf."""

import itertools
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Literal

import numpy as np
from torch import nn

from isoprune_hf.pruning.graph.axis import Axis, find, leaves
from isoprune_hf.pruning.graph.axis_graph import AxisGraph
from isoprune_hf.pruning.graph.cells import Cell, rows
from isoprune_hf.pruning.graph.layers import LAYERS, ConvTransposeNd
from isoprune_hf.pruning.graph.signatures import Entry, edges, list_entries
from isoprune_hf.pruning.groups import CoupledGroup, Member


def couple_axes(graph: AxisGraph, base: nn.Module, signature: Literal["paper", "strict"]) -> tuple[CoupledGroup, ...]:
    """Name the elements of every channel that can leave, in the order of `named_modules`."""
    builder = _Builder(graph, base, signature)
    free, found, done = graph.free(), [], set()
    for leaf, axis in free.items():
        if leaf in done or leaf in graph.heads:
            continue
        dims = [dim for dim, head in graph.heads.items() if find(head) is axis]
        link = next((link for link in graph.solution.links if leaf in link), None)
        if dims:
            group = builder.attention(axis, free[dims[0]])
        elif link:
            group = builder.linked([free[other] for other in free if other in link])
            done |= link
        else:
            group = builder.plain(axis)
        if group is not None:
            found.append(group)
    return builder.ordered(found)


class _Builder:
    def __init__(self, graph: AxisGraph, base: nn.Module, signature: Literal["paper", "strict"]):
        self.graph = graph
        self.signature = signature
        self.members = graph.members
        self.modules = dict(base.named_modules())
        self.order = {name: position for position, name in enumerate(self.modules)}
        # Leaf -> the module that multiplies two activations along it: the dims of an attention.
        self.attended = {
            id(leaf): product.module
            for product in graph.trace.products
            if not product.has_weight
            for axis in product.sizes[-2:]
            for leaf in leaves(axis)
            if leaf.frozen is None
        }

    def plain(self, leaf: Axis) -> CoupledGroup | None:
        """A group of one leaf."""
        return self._group([(leaf, leaf.size)], leaf.size)

    def linked(self, leaves: list[Axis]) -> CoupledGroup | None:
        """A group of leaves that must leave in the same proportion: each unit holds as large a share of each."""
        units = int(np.gcd.reduce([leaf.size for leaf in leaves]))
        return self._group([(leaf, units) for leaf in leaves], units)

    def _group(self, parts: list[tuple[Axis, int]], units: int) -> CoupledGroup | None:
        index: dict[tuple[str, int], list[np.ndarray]] = {}
        for leaf, _ in parts:
            for key, found in self.members.get(id(leaf), {}).items():
                index.setdefault(key, []).append(rows(found, {id(leaf): 1}, leaf.size).reshape(units, -1))
        members = self._sorted({key: np.concatenate(parts, axis=1) for key, parts in index.items()})
        entries = list_entries(members, self.modules)
        if all(entry.side == "out" for entry in entries):
            return None  # nothing reads them
        own = [leaf for leaf, _ in parts]
        inside = f"{self.attended.get(id(own[0]), '-')}."
        if len(own) == 1 and all(member.parameter.startswith(inside) for member in members):
            # One head, or heads that stay: still dims of an attention, which compete with their kind.
            heads = int(min(member.index.shape[1] for member in members) == 1)
            label = "|".join(entry.label for entry in entries)
            path = _common_path(member.parameter.rpartition(".")[0] for member in members)
            return CoupledGroup(path, f"Attention:{label}", units, members, heads)
        return CoupledGroup(self._writer(members), self._sign(entries, own), units, members)

    def _sign(self, entries: list[Entry], leaves: list[Axis]) -> str:
        if self.signature == "paper":
            return "|".join(entry.label for entry in entries)
        return "|".join(entry.strict for entry in entries) + "#" + edges(self.graph, entries, leaves)

    def attention(self, head: Axis, dim: Axis) -> CoupledGroup:
        """A group of heads and their dims."""
        both: dict[tuple[str, int], list[Cell]] = {}
        alone: dict[int, dict[tuple[str, int], list[Cell]]] = {id(head): {}, id(dim): {}}
        for leaf, other in ((head, dim), (dim, head)):
            for key, found in self.members[id(leaf)].items():
                for cell in found:
                    if id(other) not in cell.labels:
                        alone[id(leaf)].setdefault(key, []).append(cell)
                    elif leaf is head:
                        both.setdefault(key, []).append(cell)
        channels = head.size * dim.size
        labels = {id(head): dim.size, id(dim): 1}
        members = self._sorted({key: rows(found, labels, channels) for key, found in both.items()})
        whole, dims = (
            self._sorted({key: rows(found, {id(leaf): 1}, leaf.size) for key, found in alone[id(leaf)].items()})
            for leaf in (head, dim)
        )
        own = {member.parameter.rpartition(".")[0] for member in (*members, *whole, *dims)}
        path = _common_path(own)
        entries = list_entries((*members, *whole, *dims), self.modules)
        label = "|".join(entry.label for entry in entries)
        return CoupledGroup(path, f"Attention:{label}", channels, members, head.size, whole, dims)

    def _sorted(self, index: Mapping[tuple[str, int], np.ndarray]) -> tuple[Member, ...]:
        def place(key: tuple[str, int]) -> tuple[int, int, int]:
            return self.order[key[0].rpartition(".")[0]], key[1] if self._is_layer(key[0]) else 0, self._rank(key[0])

        return tuple(Member(name, dim, index[name, dim]) for name, dim in sorted(index, key=place))

    def _rank(self, name: str) -> int:
        owner = self.modules[name.rpartition(".")[0]]
        leaf = name.rpartition(".")[2]
        names = [*owner._parameters, *owner._buffers]
        return names.index(leaf) if leaf in names else len(names)

    def _is_layer(self, name: str) -> bool:
        return isinstance(self.modules[name.rpartition(".")[0]], LAYERS)

    def _writer(self, members: Iterable[Member]) -> str:
        """The first layer that writes the channels; else the first that holds them."""
        members = list(members)
        for member in members:
            path, _, leaf = member.parameter.rpartition(".")
            layer = self.modules[path]
            dim = 1 if isinstance(layer, ConvTransposeNd) else 0
            if isinstance(layer, LAYERS) and leaf == "weight" and member.dim == dim:
                return path
        return members[0].parameter.rpartition(".")[0] or members[0].parameter

    def ordered(self, groups: list[CoupledGroup]) -> tuple[CoupledGroup, ...]:
        """Sort by module, and tell groups of one module apart by a number."""
        count: dict[str, int] = {}
        named = []
        for group in sorted(groups, key=lambda group: self.order.get(group.name, -1)):
            count[group.name] = count.get(group.name, 0) + 1
            number = count[group.name]
            named.append(group if number == 1 else replace(group, name=f"{group.name}:{number}"))
        return tuple(named)


def _common_path(paths: Iterable[str]) -> str:
    """The innermost module that holds all of these."""
    shared = itertools.takewhile(
        lambda names: len(set(names)) == 1, zip(*(path.split(".") for path in paths), strict=False)
    )
    return ".".join(names[0] for names in shared)
