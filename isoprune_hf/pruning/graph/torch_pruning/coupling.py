"""From what is coupled in the traced network to coupled groups: values that know parameters and indices only."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from torch import nn

from isoprune_hf.errors import UnsupportedArchitectureError
from isoprune_hf.pruning.graph.layers import ConvNd, ConvTransposeNd
from isoprune_hf.pruning.graph.torch_pruning.architectures import Attention, PatchMerging
from isoprune_hf.pruning.groups import CoupledGroup, Member


@dataclass(frozen=True, eq=False)
class Touched:
    """One layer or loose parameter that the channels of a group lie in.

    Args:
        name: Its name in the traced network.
        target: Itself.
        dim: The dim of a loose parameter that the channels lie on.
        is_input: The channels are those that a layer reads; otherwise those that it writes, or both.
        index: Positions of every channel, (channels, k).
    """

    name: str
    target: nn.Module | nn.Parameter
    dim: int
    is_input: bool
    index: np.ndarray


@dataclass(frozen=True, eq=False)
class Coupling:
    """What can only leave together in the traced network.

    Args:
        channels: Number of channels.
        touched: Layers and parameters, in the order in which they were found.
        flows: Pairs of positions in `touched`: the channels flow from the first to the second through operations
            without parameters alone. None when nobody asked for them.
    """

    channels: int
    touched: Sequence[Touched]
    flows: Sequence[tuple[int, int]] | None = None


@dataclass(frozen=True, eq=False)
class _Entry:
    """One entry of a signature: where it stands, what it says, and the elements (parameter, dim, index) behind it."""

    position: int
    label: str
    columns: list[tuple[str, int, np.ndarray]]


def couple(found: Coupling, order: dict[str, int], stubs: dict[str, Attention | PatchMerging]) -> CoupledGroup | None:
    """Name the elements of every channel; None for the outputs of the classifier, which nothing reads.

    Args:
        found: What the engine found.
        order: Module of the traced network -> its position in `named_modules`.
        stubs: Linear of the traced network -> the part that it stands for.

    Raises:
        UnsupportedArchitectureError: The channels are coupled unevenly.
    """
    channels, ways = found.channels, 1
    entries = []
    for item in found.touched:
        entry, groups = _read_entry(item, order, stubs, strict=found.flows is not None)
        entries.append(entry)
        ways = math.lcm(ways, groups)
    if not any(item.is_input for item in found.touched) or channels % ways:
        return None
    ranks = sorted(range(len(entries)), key=lambda number: entries[number].position)
    signature = "|".join(entries[number].label for number in ranks)
    if found.flows is not None:
        place = {number: rank for rank, number in enumerate(ranks)}
        edges = sorted({(place[source], place[target]) for source, target in found.flows})
        signature += "#" + ",".join(f"{source}>{target}" for source, target in edges)
    columns = [column for number in ranks for column in entries[number].columns]
    writer = next(
        entry.columns[0][0]
        for entry in (entries[number] for number in ranks)
        if ".out" in entry.label and entry.columns[0][0].endswith(".weight")
    )
    members = tuple(_members(columns, channels, ways))
    return CoupledGroup(writer.rpartition(".")[0], signature, channels // ways, members)


def _read_entry(
    item: Touched, order: dict[str, int], stubs: dict[str, Attention | PatchMerging], *, strict: bool
) -> tuple[_Entry, int]:
    """Read an entry, and into how many parts its layer divides the channels."""
    layer, index = item.target, item.index
    if isinstance(layer, nn.Parameter):
        return _Entry(order[item.name.rpartition(".")[0]], "Parameter", [(item.name, item.dim, index)]), 1
    grouped = isinstance(layer, ConvNd) and layer.groups > 1
    depthwise = grouped and layer.groups == layer.in_channels == layer.out_channels
    ways = 1
    if (grouped and not depthwise) or isinstance(layer, nn.GroupNorm):
        ways = layer.groups if grouped else layer.num_groups
    if item.is_input and grouped:
        index = index % (layer.in_channels // layer.groups)
    label = f"{type(layer).__name__}.{'in' if item.is_input else 'depthwise' if depthwise else 'out'}"
    if strict and isinstance(layer, ConvNd):
        kernel, stride = ("x".join(map(str, sizes)) for sizes in (layer.kernel_size, layer.stride))
        label += f"(kernel {kernel}, stride {stride}, groups {'all' if depthwise else layer.groups})"
    columns = _reads(item.name, layer, index, stubs) if item.is_input else _writes(item.name, layer, index, stubs)
    return _Entry(order[item.name], label, columns), ways


def _reads(
    name: str, layer: nn.Module, index: np.ndarray, stubs: dict[str, Attention | PatchMerging]
) -> list[tuple[str, int, np.ndarray]]:
    part = stubs.get(name)
    if isinstance(part, PatchMerging):
        copies = (index[:, :, None] + layer.in_features * np.arange(4)).reshape(len(index), -1)
        return [
            (f"{part.norm}.weight", 0, copies),
            (f"{part.norm}.bias", 0, copies),
            (f"{part.reduction}.weight", 1, copies),
        ]
    readers = (name,) if part is None else part.projections
    dim = 0 if isinstance(layer, ConvTransposeNd) else 1
    return [(f"{reader}.weight", dim, index) for reader in readers]


def _writes(
    name: str, layer: nn.Module, index: np.ndarray, stubs: dict[str, Attention | PatchMerging]
) -> list[tuple[str, int, np.ndarray]]:
    part = stubs.get(name)
    tensors = {
        leaf: tensor for leaf, tensor in [*layer._parameters.items(), *layer._buffers.items()] if tensor is not None
    }
    if part is not None:
        name = part.output if isinstance(part, Attention) else part.reduction
        tensors = {leaf: tensors[leaf] for leaf in part.written}
    dim = 1 if isinstance(layer, ConvTransposeNd) else 0
    return [
        (f"{name}.{leaf}", dim if leaf == "weight" else 0, index)
        for leaf, tensor in tensors.items()
        if tensor.ndim > 0
    ]


def _members(columns: list[tuple[str, int, np.ndarray]], channels: int, ways: int) -> Iterable[Member]:
    """Merge what a tensor contributes several times; in grouped layers a channel stands for one of every group."""
    merged: dict[tuple[str, int], list[np.ndarray]] = {}
    for parameter, dim, index in columns:
        merged.setdefault((parameter, dim), []).append(index)
    for (parameter, dim), parts in merged.items():
        index = np.concatenate(parts, axis=1) if len(parts) > 1 else parts[0]
        if ways > 1:
            index = index.reshape(ways, channels // ways, -1).transpose(1, 0, 2).reshape(channels // ways, -1)
        yield Member(parameter, dim, _unique_rows(index, parameter))


def _unique_rows(index: np.ndarray, parameter: str) -> np.ndarray:
    """Sort every row and drop what it says twice."""
    if index.shape[1] == 1:
        return index
    index = np.sort(index, axis=1)
    is_new = np.ones(index.shape, dtype=bool)
    is_new[:, 1:] = index[:, 1:] != index[:, :-1]
    counts = is_new.sum(axis=1)
    if (counts != counts[0]).any():
        raise UnsupportedArchitectureError(f"the channels of {parameter} are coupled unevenly, which is not supported")
    return index[is_new].reshape(len(index), -1)


def couple_attention(base: nn.Module, part: Attention) -> CoupledGroup:
    """Name the elements of every dim of every head; no engine is needed for that."""
    channels = np.arange(part.num_heads * part.head_dim)[:, None]
    # A head of keys and values with all the query heads that share it: those lie one behind the other.
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
