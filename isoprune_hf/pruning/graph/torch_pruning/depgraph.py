"""Coupled groups as torch-pruning's dependency graph has them: the independent reference of the axis graph.

Only the graph is torch-pruning's. Its groups hold one Python object for each channel of each edge, and every one
recomputes the index maps of the whole graph; the walk here carries arrays instead and finds the same groups.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
import torch_pruning
from torch import nn
from torch_pruning.dependency import Node, index_mapping

from isoprune_hf.errors import UnsupportedArchitectureError
from isoprune_hf.pruning.graph.layers import ConvNd
from isoprune_hf.pruning.graph.torch_pruning.architectures import Attention
from isoprune_hf.pruning.graph.torch_pruning.coupling import Coupling, Touched, couple, couple_attention
from isoprune_hf.pruning.graph.torch_pruning.tracing import loose_parameters, traced_copy
from isoprune_hf.pruning.groups import CoupledGroup

# What torch-pruning raises where it cannot follow a model.
_ENGINE_ERRORS = (AssertionError, AttributeError, LookupError, RuntimeError, TypeError, ValueError, ArithmeticError)
_ROOTS = (ConvNd, nn.Linear)


def couple_nodes(
    base: nn.Module, image_size: tuple[int, ...], signature: Literal["paper", "strict"]
) -> list[CoupledGroup]:
    """Find the coupled groups of a network; reads shapes only and leaves it untouched.

    Raises:
        UnsupportedArchitectureError: The network cannot be traced, or holds a part of an unknown build.
    """
    traced = traced_copy(base)
    order = {name: position for position, (name, _) in enumerate(traced.network.named_modules())}
    couplings = _find_couplings(traced.network, image_size, with_flows=signature == "strict")
    groups = [group for found in couplings if (group := couple(found, order, traced.stubs)) is not None]
    groups += [couple_attention(base, part) for part in traced.stubs.values() if isinstance(part, Attention)]
    tensors = base.state_dict()
    for member in (member for group in groups for member in group.members):
        if member.index.max() >= tensors[member.parameter].shape[member.dim]:
            raise UnsupportedArchitectureError(
                f"the channels of {member.parameter} were taken for those of another layer"
            )
    return groups


def _find_couplings(network: nn.Module, image_size: tuple[int, ...], *, with_flows: bool) -> list[Coupling]:
    graph = torch_pruning.DependencyGraph()
    try:
        with torch.enable_grad():
            graph.build_dependency(
                network,
                example_inputs=torch.zeros(1, *image_size, device="meta"),
                # Without a forward_fn, a call that fails is tried a second way, and that one's error is shown.
                forward_fn=lambda model, images: model(images),
                output_transform=lambda output: output if isinstance(output, torch.Tensor) else output.logits,
                unwrapped_parameters=loose_parameters(network),
                verbose=False,
            )
        return list(_Walk(graph, network).couplings(with_flows=with_flows))
    except _ENGINE_ERRORS as error:
        if isinstance(error, UnsupportedArchitectureError):
            raise
        reason = " ".join(str(error).split())
        raise UnsupportedArchitectureError(
            f"the channels of {type(network).__name__} cannot be followed ({type(error).__name__}: {reason}); "
            "supported are ViT, DeiT, Swin, ConvNeXt, ResNet, MobileNetV2 and models built alike"
        ) from error


@dataclass(frozen=True, eq=False)
class Positions:
    """Channels as they lie in one tensor: their positions there, and which channel of the group each is."""

    idx: np.ndarray
    root: np.ndarray
    low: int
    high: int

    @classmethod
    def of(cls, idx: np.ndarray, root: np.ndarray) -> "Positions":
        return cls(idx, root, int(idx.min()), int(idx.max()) + 1) if len(idx) else cls(idx, root, 0, 0)

    def shifted(self, offset: int) -> "Positions":
        return Positions(self.idx + offset, self.root, self.low + offset, self.high + offset) if offset else self

    def within(self, low: int, high: int) -> "Positions":
        """Those in [low, high), counted from `low`."""
        if self.low >= high or self.high <= low:
            return _NOWHERE
        if self.low >= low and self.high <= high:
            return self.shifted(-low)
        inside = (self.idx >= low) & (self.idx < high)
        return Positions.of(self.idx[inside] - low, self.root[inside])


_NOWHERE = Positions.of(np.arange(0), np.arange(0))


def _concat(mapping: index_mapping._ConcatIndexMapping, at: Positions) -> Positions:
    low, high = mapping.offset
    return at.within(low, high) if mapping.reverse else at.shifted(low)


def _split(mapping: index_mapping._SplitIndexMapping, at: Positions) -> Positions:
    low, high = mapping.offset
    return at.shifted(low) if mapping.reverse else at.within(low, high)


def _slice(mapping: index_mapping._SliceIndexMapping, at: Positions) -> Positions:
    if mapping.reverse:
        return Positions.of(at.idx * mapping.step + mapping.start, at.root)
    at = at.within(mapping.start, mapping.end)
    hit = at.idx % mapping.step == 0
    return Positions.of(at.idx[hit] // mapping.step, at.root[hit])


def _flatten(mapping: index_mapping._FlattenIndexMapping, at: Positions) -> Positions:
    stride = mapping._stride
    if mapping.reverse:
        pairs = np.unique(np.stack([at.idx // stride, at.root]), axis=1)
        return Positions.of(pairs[0], pairs[1])
    return Positions.of((at.idx[:, None] * stride + np.arange(stride)).ravel(), np.repeat(at.root, stride))


_MAPPINGS: dict[type, Callable[..., Positions]] = {
    index_mapping._ConcatIndexMapping: _concat,
    index_mapping._SplitIndexMapping: _split,
    index_mapping._SliceIndexMapping: _slice,
    index_mapping._FlattenIndexMapping: _flatten,
}


@dataclass(frozen=True, eq=False)
class _Edge:
    """A dependency: what is taken from `trigger` of its source is taken by `handler` of its target."""

    trigger: int
    target: Node
    handler: int
    mappings: tuple[object, ...]


class _Walk:
    """Follows the channels of every root through the graph; sides (pruning functions) are numbers here."""

    def __init__(self, graph: torch_pruning.DependencyGraph, network: nn.Module):
        self.graph = graph
        self.names = {owner: name for name, owner in [*network.named_modules(), *network.named_parameters()]}
        self.sides: dict[object, int] = {}
        self.edges = {
            node: [
                _Edge(
                    self._side(dep.trigger),
                    dep.target,
                    self._side(dep.handler),
                    tuple(mapping for mapping in dep.index_mapping if mapping is not None),
                )
                for dep in node.dependencies
            ]
            for node in graph.module2node.values()
        }
        self.written = {side for fn, side in self.sides.items() if graph.is_out_channel_pruning_fn(fn)}
        self.read = {side for fn, side in self.sides.items() if graph.is_in_channel_pruning_fn(fn)}

    def _side(self, fn: object) -> int:
        return self.sides.setdefault(fn, len(self.sides))

    def couplings(self, *, with_flows: bool) -> Iterator[Coupling]:
        """Yield what is coupled, once, starting at each layer that writes channels."""
        done: set[Node] = set()
        for module, node in self.graph.module2node.items():
            if not isinstance(module, _ROOTS) or node in done:
                continue
            pruner = self.graph.get_pruner_of_module(module)
            channels = pruner.get_out_channels(module)
            found = self._follow(node, self._side(pruner.prune_out_channels), channels)
            done |= {node for node, side in found if side in self.written}
            keys = [key for key in found if key[0].module in self.names]
            touched = [self._touched(node, side, found[node, side], channels) for node, side in keys]
            yield Coupling(channels, touched, self._flows(keys, found.keys()) if with_flows else None)

    def _follow(self, root: Node, side: int, channels: int) -> dict[tuple[Node, int], list[Positions]]:
        """Find all that is reached, in the order and with the positions of torch-pruning's `get_pruning_group`."""
        start = Positions.of(np.arange(channels), np.arange(channels))
        same = {_key(start): start}
        found = {(root, side): [start]}
        seen, visited, stack = {(root, side, id(start))}, set(), [(root, side, start)]
        while stack:
            node, side, here = stack.pop()
            visited.add(node)
            for edge in self.edges[node]:
                if edge.trigger != side:
                    continue
                there = here
                for mapping in edge.mappings:
                    there = apply_mapping(mapping, there)
                if there.low == there.high:
                    continue
                if there is not here:
                    there = same.setdefault(_key(there), there)
                key = (edge.target, edge.handler, id(there))
                if key in seen and edge.target in visited:
                    continue
                if key not in seen:
                    found.setdefault(key[:2], []).append(there)
                    seen.add(key)
                stack.append((edge.target, edge.handler, there))
        return found

    def _touched(self, node: Node, side: int, parts: list[Positions], channels: int) -> Touched:
        name = self.names[node.module]
        is_input = side in self.read and side not in self.written
        return Touched(name, node.module, node.pruning_dim, is_input, _by_channel(parts, channels, name))

    def _flows(self, keys: list[tuple[Node, int]], found: set[tuple[Node, int]]) -> list[tuple[int, int]]:
        """Pairs of positions in `keys` that are joined without another of them in between."""
        place = {key: position for position, key in enumerate(keys)}
        flows = []
        for key in keys:
            if key[1] not in self.written:
                continue
            stack, visited = [key[0]], {key[0]}
            while stack:
                for node in stack.pop().outputs:
                    reached = (node, self._side(self.graph.get_pruner_of_module(node.module).prune_in_channels))
                    if reached not in found or node in visited:
                        continue
                    visited.add(node)
                    if reached in place:
                        flows.append((place[key], place[reached]))
                    else:
                        stack.append(node)
        return flows


def apply_mapping(mapping: object, at: Positions) -> Positions:
    """Send positions through one of torch-pruning's index maps.

    Raises:
        UnsupportedArchitectureError: The map is of an unknown kind; the message names it.
    """
    known = _MAPPINGS.get(type(mapping))
    if known is None:
        raise UnsupportedArchitectureError(
            f"the channels pass an operation that cannot be followed ({type(mapping).__name__.strip('_')})"
        )
    return known(mapping, at)


def _key(at: Positions) -> tuple[bytes, bytes]:
    return at.idx.tobytes(), at.root.tobytes()


def _by_channel(parts: list[Positions], channels: int, name: str) -> np.ndarray:
    """Positions of every channel in a layer, (channels, k); a position that is reached twice counts the first time."""
    positions = np.concatenate([part.idx for part in parts]) if len(parts) > 1 else parts[0].idx
    roots = np.concatenate([part.root for part in parts]) if len(parts) > 1 else parts[0].root
    if len(parts) > 1:
        first = np.sort(np.unique(positions, return_index=True)[1])
        positions, roots = positions[first], roots[first]
    if len(positions) % channels or not (np.bincount(roots, minlength=channels) == len(positions) // channels).all():
        raise UnsupportedArchitectureError(f"the channels of {name} are coupled unevenly, which is not supported")
    return positions[np.argsort(roots, kind="stable")].reshape(channels, -1)
