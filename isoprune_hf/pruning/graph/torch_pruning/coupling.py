"""Coupled groups as values: `couple` turns the layers that the engine found into members, by parameter and index."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from torch import nn

from isoprune_hf.errors import UnsupportedArchitectureError
from isoprune_hf.pruning.graph.layers import ConvNd, ConvTransposeNd, convolution_settings, is_depthwise
from isoprune_hf.pruning.graph.torch_private import own_buffers, own_parameters
from isoprune_hf.pruning.graph.torch_pruning.architectures import Attention, PatchMerging
from isoprune_hf.pruning.groups import CoupledGroup, Member

_Stubs = Mapping[str, Attention | PatchMerging]


@dataclass(frozen=True, eq=False)
class TouchedLayer:
    """A layer, or a parameter that belongs to no layer, that has channels of a group.

    Args:
        name: Name in the traced network.
        target: The layer or parameter itself.
        dim: The dim of the channels in a parameter without a layer.
        is_input: The channels are inputs of the layer; else its outputs, or both.
        index: Positions of every channel, (channels, k).
    """

    name: str
    target: nn.Module | nn.Parameter
    dim: int
    is_input: bool
    index: np.ndarray


@dataclass(frozen=True, eq=False)
class Coupling:
    """Channels of the traced network that can only be removed together.

    Args:
        channels: Number of channels.
        touched: Layers and parameters, in the order in which they were found.
        flows: Pairs of positions in `touched` between which channels flow through operations without parameters only;
            None if flows were not asked for.
    """

    channels: int
    touched: Sequence[TouchedLayer]
    flows: Sequence[tuple[int, int]] | None = None


class _Column(NamedTuple):
    """Elements of one dim of a parameter: row c of `positions` has those of channel c."""

    parameter: str
    dim: int
    positions: np.ndarray


@dataclass(frozen=True, eq=False)
class _Entry:
    """One entry of a signature.

    Args:
        position: Position of the layer in `named_modules`.
        label: Text of the entry.
        columns: The elements of its channels.
        groups: Groups into which the layer divides its channels.
    """

    position: int
    label: str
    columns: list[_Column]
    groups: int = 1


def couple(found: Coupling, order: Mapping[str, int], stubs: _Stubs) -> CoupledGroup | None:
    """Build the coupled group of a coupling; None for the outputs of the network, which no layer reads.

    Args:
        found: The coupling.
        order: Module of the traced network -> its position in `named_modules`.
        stubs: Linear layer of the traced network -> the part of the base that it replaces.

    Raises:
        UnsupportedArchitectureError: The channels have unequal numbers of elements.
    """
    entries = [_read_entry(item, order, stubs, strict=found.flows is not None) for item in found.touched]
    ways = math.lcm(*(entry.groups for entry in entries))
    if not any(item.is_input for item in found.touched) or found.channels % ways:
        return None
    ranks = sorted(range(len(entries)), key=lambda number: entries[number].position)
    signature = "|".join(entries[number].label for number in ranks)
    if found.flows is not None:
        places = {number: rank for rank, number in enumerate(ranks)}
        edges = sorted({(places[source], places[target]) for source, target in found.flows})
        signature += "#" + ",".join(f"{source}>{target}" for source, target in edges)
    columns = [column for number in ranks for column in entries[number].columns]
    writer = next(
        entry.columns[0].parameter
        for entry in (entries[number] for number in ranks)
        if ".out" in entry.label and entry.columns[0].parameter.endswith(".weight")
    )
    members = tuple(_members(columns, found.channels, ways))
    return CoupledGroup(writer.rpartition(".")[0], signature, found.channels // ways, members)


def _read_entry(item: TouchedLayer, order: Mapping[str, int], stubs: _Stubs, *, strict: bool) -> _Entry:
    layer = item.target
    if isinstance(layer, nn.Parameter):
        owner = item.name.rpartition(".")[0]
        return _Entry(order[owner], "Parameter", [_Column(item.name, item.dim, item.index)])
    index = item.index
    groups = 1
    if isinstance(layer, nn.GroupNorm):
        groups = layer.num_groups
    elif isinstance(layer, ConvNd) and layer.groups > 1:
        if not is_depthwise(layer):
            groups = layer.groups
        if item.is_input:  # the weight has the input channels of one group
            index = index % (layer.in_channels // layer.groups)
    label = f"{type(layer).__name__}.{'in' if item.is_input else 'depthwise' if is_depthwise(layer) else 'out'}"
    if strict:
        label += convolution_settings(layer)
    columns = _reads(item.name, layer, index, stubs) if item.is_input else _writes(item.name, layer, index, stubs)
    return _Entry(order[item.name], label, columns, groups)


def _reads(name: str, layer: nn.Module, index: np.ndarray, stubs: _Stubs) -> list[_Column]:
    """Return the elements of a layer's input channels."""
    part = stubs.get(name)
    if isinstance(part, PatchMerging) and isinstance(layer, nn.Linear):
        # The stand-in reads one of the four patches.
        repeated = (index[:, :, None] + layer.in_features * np.arange(4)).reshape(len(index), -1)
        return [
            _Column(f"{part.norm}.weight", 0, repeated),
            _Column(f"{part.norm}.bias", 0, repeated),
            _Column(f"{part.reduction}.weight", 1, repeated),
        ]
    readers = part.projections if isinstance(part, Attention) else (name,)
    dim = 0 if isinstance(layer, ConvTransposeNd) else 1
    return [_Column(f"{reader}.weight", dim, index) for reader in readers]


def _writes(name: str, layer: nn.Module, index: np.ndarray, stubs: _Stubs) -> list[_Column]:
    """Return the elements of a layer's output channels."""
    part = stubs.get(name)
    tensors = {
        leaf: tensor
        for leaf, tensor in [*own_parameters(layer).items(), *own_buffers(layer).items()]
        if tensor is not None
    }
    if part is not None:
        name = part.output if isinstance(part, Attention) else part.reduction
        tensors = {leaf: tensors[leaf] for leaf in part.written}
    dim = 1 if isinstance(layer, ConvTransposeNd) else 0
    return [
        _Column(f"{name}.{leaf}", dim if leaf == "weight" else 0, index)
        for leaf, tensor in tensors.items()
        if tensor.ndim > 0
    ]


def _members(columns: Iterable[_Column], channels: int, ways: int) -> Iterable[Member]:
    """Merge the columns of each dim of a tensor; in grouped layers, a unit is one channel of every group.

    Args:
        columns: The elements of all channels.
        channels: Number of channels.
        ways: Number of groups that all layers agree on.
    """
    merged: dict[tuple[str, int], list[np.ndarray]] = {}
    for column in columns:
        merged.setdefault((column.parameter, column.dim), []).append(column.positions)
    for (parameter, dim), parts in merged.items():
        index = np.concatenate(parts, axis=1) if len(parts) > 1 else parts[0]
        if ways > 1:
            index = index.reshape(ways, channels // ways, -1).transpose(1, 0, 2).reshape(channels // ways, -1)
        yield Member(parameter, dim, _unique_rows(index, parameter))


def _unique_rows(index: np.ndarray, parameter: str) -> np.ndarray:
    """Sort every row and drop repeated positions."""
    if index.shape[1] == 1:
        return index
    index = np.sort(index, axis=1)
    is_new = np.ones(index.shape, dtype=bool)
    is_new[:, 1:] = index[:, 1:] != index[:, :-1]
    counts = is_new.sum(axis=1)
    if (counts != counts[0]).any():
        raise UnsupportedArchitectureError(
            f"the channels of {parameter} have unequal numbers of elements, which torch-pruning's engine does not "
            "support"
        )
    return index[is_new].reshape(len(index), -1)


def couple_attention(base: nn.Module, part: Attention) -> CoupledGroup:
    """Build the group of the heads and dims of an attention, from its parts only."""
    channels = np.arange(part.num_heads * part.head_dim)[:, None]
    # The query heads that share a head of keys and values are adjacent.
    heads, dims = np.divmod(channels, part.head_dim)
    queries = (heads * part.queries_per_head + np.arange(part.queries_per_head)) * part.head_dim + dims
    stacked = channels + len(channels) * np.arange(part.stacked)
    members = []
    for position, name in enumerate(part.projections):
        index = queries if position == 0 and part.queries_per_head > 1 else stacked
        members.append(Member(f"{name}.weight", 0, index))
        if base.get_submodule(name).bias is not None:
            members.append(Member(f"{name}.bias", 0, index))
    members.append(Member(f"{part.output}.weight", 1, queries))
    tables = tuple(Member(table, 1, np.arange(part.num_heads)[:, None]) for table in part.tables)
    labels = ["Linear.out"] * len(part.projections) + ["Linear.in"] + ["Parameter"] * len(part.tables)
    return CoupledGroup(
        part.path, "Attention:" + "|".join(labels), len(channels), tuple(members), part.num_heads, tables
    )
