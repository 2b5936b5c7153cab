"""Coupled groups from torch-pruning's dependency graph: `couple_nodes`.

Only the graph is torch-pruning's. Its own search for groups makes one Python object per channel of each edge and
recomputes the index maps of the whole graph for every group; `_Walk` carries arrays and finds the same groups.
"""

from collections.abc import Iterator, Set
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
import torch_pruning
from torch import nn
from torch_pruning.dependency import Node

from isoprune_hf.errors import UnsupportedArchitectureError
from isoprune_hf.pruning.graph.layers import ConvNd
from isoprune_hf.pruning.graph.torch_pruning.architectures import Attention
from isoprune_hf.pruning.graph.torch_pruning.coupling import Coupling, TouchedLayer, couple, couple_attention
from isoprune_hf.pruning.graph.torch_pruning.index_maps import Positions, apply_mapping
from isoprune_hf.pruning.graph.torch_pruning.stand_ins import loose_parameters, traced_copy
from isoprune_hf.pruning.groups import CoupledGroup

# The errors that torch-pruning raises for a model that it does not support; it has no class of its own for them.
_ENGINE_ERRORS = (AssertionError, AttributeError, LookupError, RuntimeError, TypeError, ValueError, ArithmeticError)
_ROOTS = (ConvNd, nn.Linear)
_Key = tuple[Node, int]  # a node of the graph and one of its sides


def couple_nodes(
    base: nn.Module, image_size: tuple[int, ...], signature: Literal["paper", "strict"]
) -> list[CoupledGroup]:
    """Find the coupled groups of a network; reads shapes only and leaves the network untouched.

    Args:
        base: The network.
        image_size: Of one image, (C, H, W).
        signature: As in `trace_groups`.

    Raises:
        UnsupportedArchitectureError: torch-pruning does not support the network, or a part of it.
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
                f"torch-pruning assigned the channels of another layer to {member.parameter}; "
                "use prune.engine: axes for this model"
            )
    return groups


def _find_couplings(network: nn.Module, image_size: tuple[int, ...], *, with_flows: bool) -> list[Coupling]:
    graph = torch_pruning.DependencyGraph()
    try:
        with torch.enable_grad():
            graph.build_dependency(
                network,
                example_inputs=torch.zeros(1, *image_size, device="meta"),
                # Without a forward_fn, torch-pruning retries a failing call in another way and reports the error of
                # the second call only.
                forward_fn=lambda model, images: model(images),
                output_transform=lambda output: output if isinstance(output, torch.Tensor) else output.logits,
                unwrapped_parameters=loose_parameters(network),
                verbose=False,
            )
        return list(_Walk(graph, network).couplings(with_flows=with_flows))
    except UnsupportedArchitectureError:
        raise
    except _ENGINE_ERRORS as error:
        reason = " ".join(str(error).split())
        raise UnsupportedArchitectureError(
            f"torch-pruning cannot trace the channels of {type(network).__name__} ({type(error).__name__}: {reason}); "
            "it supports ViT, DeiT, Swin, ConvNeXt, ResNet, MobileNetV2 and models of the same structure"
        ) from error


@dataclass(frozen=True, eq=False)
class _Edge:
    """A dependency: channels removed on side `trigger` of its source are removed on side `handler` of its target."""

    trigger: int
    target: Node
    handler: int
    mappings: tuple[object, ...]


class _Walk:
    """Follows the channels of every root through the graph.

    A side of a node, its input or output channels, is torch-pruning's function that prunes it; here it is a number.
    """

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
        """Yield each set of coupled channels once, starting at each layer that writes channels."""
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

    def _follow(self, root: Node, side: int, channels: int) -> dict[_Key, list[Positions]]:
        """Return all sides that the channels of a root reach, and their positions there.

        The order and the positions are those of torch-pruning's `get_pruning_group`.
        """
        start = Positions.of(np.arange(channels), np.arange(channels))
        same = {_content(start): start}  # one object for equal positions, so that they compare by identity
        found: dict[_Key, list[Positions]] = {(root, side): [start]}
        seen = {(root, side, id(start))}
        visited: set[Node] = set()
        stack = [(root, side, start)]
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
                    there = same.setdefault(_content(there), there)
                key = (edge.target, edge.handler, id(there))
                if key in seen and edge.target in visited:
                    continue
                if key not in seen:
                    found.setdefault(key[:2], []).append(there)
                    seen.add(key)
                stack.append((edge.target, edge.handler, there))
        return found

    def _touched(self, node: Node, side: int, parts: list[Positions], channels: int) -> TouchedLayer:
        name = self.names[node.module]
        is_input = side in self.read and side not in self.written
        return TouchedLayer(name, node.module, node.pruning_dim, is_input, _by_channel(parts, channels, name))

    def _flows(self, keys: list[_Key], found: Set[_Key]) -> list[tuple[int, int]]:
        """Return the pairs of positions in `keys` between which channels flow and pass no other of `keys`."""
        places = {key: position for position, key in enumerate(keys)}
        flows = []
        for key in keys:
            if key[1] not in self.written:
                continue
            stack = [key[0]]
            visited = {key[0]}
            while stack:
                for node in stack.pop().outputs:
                    reached = (node, self._side(self.graph.get_pruner_of_module(node.module).prune_in_channels))
                    if reached not in found or node in visited:
                        continue
                    visited.add(node)
                    if reached in places:
                        flows.append((places[key], places[reached]))
                    else:
                        stack.append(node)
        return flows


def _content(at: Positions) -> tuple[bytes, bytes]:
    return at.idx.tobytes(), at.root.tobytes()


def _by_channel(parts: list[Positions], channels: int, name: str) -> np.ndarray:
    """Return the positions of every channel in a layer, (channels, k); repeated positions count the first time."""
    positions = np.concatenate([part.idx for part in parts]) if len(parts) > 1 else parts[0].idx
    roots = np.concatenate([part.root for part in parts]) if len(parts) > 1 else parts[0].root
    if len(parts) > 1:
        first = np.sort(np.unique(positions, return_index=True)[1])
        positions, roots = positions[first], roots[first]
    if len(positions) % channels or not (np.bincount(roots, minlength=channels) == len(positions) // channels).all():
        raise UnsupportedArchitectureError(
            f"the channels of {name} have unequal numbers of elements, which torch-pruning's engine does not support"
        )
    return positions[np.argsort(roots, kind="stable")].reshape(channels, -1)
