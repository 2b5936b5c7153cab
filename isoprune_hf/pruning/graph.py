"""Coupled groups: which channels can only leave together, found by torch-pruning's dependency graph.

The graph is translated at once into values that know parameters and indices only, so that nothing else depends on the
engine.
"""

import math
from collections.abc import Iterable

import numpy as np
import torch
import torch_pruning
from torch import nn

from isoprune_hf.checkpoint.modeling_isoprune import IsoPruneForImageClassification
from isoprune_hf.checkpoint.structure import meta_copy
from isoprune_hf.errors import UnsupportedArchitectureError
from isoprune_hf.pruning.architectures import Attention, PatchMerging, find_attention, find_patch_merging
from isoprune_hf.pruning.groups import CoupledGroup, Member

# What torch-pruning raises where it cannot follow a model.
_ENGINE_ERRORS = (AssertionError, AttributeError, LookupError, RuntimeError, TypeError, ValueError, ArithmeticError)


class _AttentionStub(nn.Module):
    """Traces as one linear: the channels of attention are known without the engine (see `_attention_group`)."""

    def __init__(self, inputs: int, outputs: int, returns_tuple: bool):
        super().__init__()
        self.linear = nn.Linear(inputs, outputs, device="meta")
        self.returns_tuple = returns_tuple

    def forward(
        self, hidden: torch.Tensor, *args: object, **kwargs: object
    ) -> torch.Tensor | tuple[torch.Tensor, None]:
        output = self.linear(hidden)
        return (output, None) if self.returns_tuple else output


class _PatchMergingStub(nn.Module):
    """Traces as one linear over one copy of the channels; keeps the output's shape."""

    def __init__(self, inputs: int, outputs: int):
        super().__init__()
        self.linear = nn.Linear(inputs, outputs, device="meta")

    def forward(self, hidden: torch.Tensor, dimensions: tuple[int, int] | None = None) -> torch.Tensor:
        if dimensions is None:  # timm: (B, H, W, C)
            batch, height, width, channels = hidden.shape
            shape = (batch, (height + 1) // 2, (width + 1) // 2, channels)
            return self.linear(hidden.mean((1, 2), keepdim=True) + hidden.new_zeros(shape))
        height, width = dimensions  # transformers: (B, H * W, C)
        shape = (hidden.shape[0], ((height + 1) // 2) * ((width + 1) // 2), hidden.shape[2])
        return self.linear(hidden.mean(1, keepdim=True) + hidden.new_zeros(shape))


def trace_groups(model: IsoPruneForImageClassification) -> tuple[CoupledGroup, ...]:
    """Find the coupled groups of a model; reads shapes only and leaves the model untouched.

    Args:
        model: A base or a pruned model on any device.

    Returns:
        Groups in the order of execution. The outputs of the classifier are never among them.

    Raises:
        UnsupportedArchitectureError: The model cannot be traced, or holds a part of an unknown build.
    """
    base = model.model
    attentions, mergings = list(find_attention(base)), list(find_patch_merging(base))
    traced = meta_copy(model).model.requires_grad_(True).eval()
    stubs: dict[str, Attention | PatchMerging] = {}
    for part in attentions:
        stub = _AttentionStub(
            base.get_submodule(part.projections[0]).in_features,
            base.get_submodule(part.output).out_features,
            part.returns_tuple,
        )
        traced.set_submodule(part.path, stub)
        stubs[f"{part.path}.linear"] = part
    for part in mergings:
        reduction = base.get_submodule(part.reduction)
        traced.set_submodule(part.path, _PatchMergingStub(reduction.in_features // 4, reduction.out_features))
        stubs[f"{part.path}.linear"] = part
    order = {name: position for position, (name, _) in enumerate(base.named_modules())}
    groups = [group for group in _engine_groups(traced, tuple(model.config.image_size), stubs) if group is not None]
    groups += [_attention_group(base, part) for part in attentions]
    tensors = base.state_dict()
    for member in (member for group in groups for member in group.members):
        if member.index.max() >= tensors[member.parameter].shape[member.dim]:
            raise UnsupportedArchitectureError(
                f"the channels of {member.parameter} were taken for those of another layer"
            )
    return tuple(sorted(groups, key=lambda group: order[group.name]))


def _engine_groups(
    traced: nn.Module, image_size: tuple[int, ...], stubs: dict[str, Attention | PatchMerging]
) -> Iterable[CoupledGroup | None]:
    names = {owner: name for name, owner in [*traced.named_modules(), *traced.named_parameters()]}
    order = {name: position for position, (name, _) in enumerate(traced.named_modules())}
    example = torch.zeros(1, *image_size, device="meta")
    graph = torch_pruning.DependencyGraph()
    try:
        graph.build_dependency(
            traced,
            example_inputs=(example,),
            output_transform=lambda output: output if isinstance(output, torch.Tensor) else output.logits,
            unwrapped_parameters=_loose_parameters(traced),
            verbose=False,
        )
        for found in graph.get_all_groups():
            yield _translate(graph, found, names, order, stubs)
    except _ENGINE_ERRORS as error:
        if isinstance(error, UnsupportedArchitectureError):
            raise
        raise UnsupportedArchitectureError(
            f"the channels of {type(traced).__name__} cannot be followed ({type(error).__name__}: {error}); "
            "supported are ViT, DeiT, Swin, ConvNeXt, ResNet, MobileNetV2 and models built alike"
        ) from error


def _loose_parameters(traced: nn.Module) -> list[tuple[nn.Parameter, int]]:
    """Parameters that no layer owns (tokens, positions, LayerScale): channels lie on the last dim that is not 1."""
    layers = (
        nn.Linear,
        nn.modules.conv._ConvNd,
        nn.modules.batchnorm._BatchNorm,
        nn.LayerNorm,
        nn.GroupNorm,
        nn.PReLU,
        nn.Embedding,
    )
    owned = {
        id(p) for module in traced.modules() if isinstance(module, layers) for p in module.parameters(recurse=False)
    }
    loose = [p for p in traced.parameters() if id(p) not in owned]
    return [(p, max(d for d, size in enumerate(p.shape) if size > 1)) for p in loose if p.numel() > 1]


def _translate(
    graph: torch_pruning.DependencyGraph,
    found: torch_pruning.Group,
    names: dict[nn.Module | nn.Parameter, str],
    order: dict[str, int],
    stubs: dict[str, Attention | PatchMerging],
) -> CoupledGroup | None:
    channels = len(found[0].idxs)
    entries: list[tuple[int, str, list[tuple[str, int, np.ndarray]]]] = []
    ways = 1
    is_read = False
    for position in range(len(found)):
        item = found[position]
        target = item.dep.target.module
        if target not in names:  # an operation without parameters
            continue
        name = names[target]
        index = _by_channel(item, channels, name)
        if isinstance(target, nn.Parameter):
            entries.append((order[name.rpartition(".")[0]], "Parameter", [(name, item.dep.target.pruning_dim, index)]))
            continue
        grouped = isinstance(target, nn.modules.conv._ConvNd) and target.groups > 1
        depthwise = grouped and target.groups == target.in_channels == target.out_channels
        incoming = graph.is_in_channel_pruning_fn(item.dep.handler) and not graph.is_out_channel_pruning_fn(
            item.dep.handler
        )
        if (grouped and not depthwise) or isinstance(target, nn.GroupNorm):
            ways = math.lcm(ways, target.groups if grouped else target.num_groups)
        if incoming and grouped:
            index = index % (target.in_channels // target.groups)
        side = "in" if incoming else ("depthwise" if depthwise else "out")
        columns = _reads(name, target, index, stubs) if incoming else _writes(name, target, index, stubs)
        entries.append((order[name], f"{type(target).__name__}.{side}", columns))
        is_read = is_read or incoming
    if not is_read or channels % ways:
        return None  # nothing reads these channels: the outputs of the classifier
    entries.sort(key=lambda entry: entry[0])
    members = tuple(_members([column for _, _, columns in entries for column in columns], channels, ways))
    writer = next(
        columns[0][0] for _, label, columns in entries if label.endswith(".out") and columns[0][0].endswith(".weight")
    )
    return CoupledGroup(
        writer.rpartition(".")[0], "|".join(label for _, label, _ in entries), channels // ways, members
    )


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
    dim = 0 if isinstance(layer, nn.modules.conv._ConvTransposeNd) else 1
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
    dim = 1 if isinstance(layer, nn.modules.conv._ConvTransposeNd) else 0
    return [
        (f"{name}.{leaf}", dim if leaf == "weight" else 0, index)
        for leaf, tensor in tensors.items()
        if tensor.ndim > 0
    ]


def _by_channel(item: torch_pruning._helpers.GroupItem, channels: int, name: str) -> np.ndarray:
    """Positions of every channel in this layer: (channels, k)."""
    roots, positions = np.asarray(item.root_idxs), np.asarray(item.idxs)
    if len(positions) % channels or not (np.bincount(roots, minlength=channels) == len(positions) // channels).all():
        raise UnsupportedArchitectureError(f"the channels of {name} are coupled unevenly, which is not supported")
    return positions[np.argsort(roots, kind="stable")].reshape(channels, -1)


def _members(columns: list[tuple[str, int, np.ndarray]], channels: int, ways: int) -> Iterable[Member]:
    """Merge what a tensor contributes several times; in grouped layers a channel stands for one of every group."""
    merged: dict[tuple[str, int], list[np.ndarray]] = {}
    for parameter, dim, index in columns:
        merged.setdefault((parameter, dim), []).append(index)
    for (parameter, dim), parts in merged.items():
        index = np.concatenate(parts, axis=1)
        if ways > 1:
            index = index.reshape(ways, channels // ways, -1).transpose(1, 0, 2).reshape(channels // ways, -1)
        rows = [np.unique(row) for row in index]
        if len({len(row) for row in rows}) > 1:
            raise UnsupportedArchitectureError(
                f"the channels of {parameter} are coupled unevenly, which is not supported"
            )
        yield Member(parameter, dim, np.stack(rows))


def _attention_group(base: nn.Module, part: Attention) -> CoupledGroup:
    width = part.num_heads * part.head_dim
    one = np.arange(width)[:, None]
    stacked = one + width * np.arange(part.stacked)
    members = []
    for name in part.projections:
        members.append(Member(f"{name}.weight", 0, stacked))
        if base.get_submodule(name).bias is not None:
            members.append(Member(f"{name}.bias", 0, stacked))
    members.append(Member(f"{part.output}.weight", 1, one))
    heads = tuple(Member(table, 1, np.arange(part.num_heads)[:, None]) for table in part.tables)
    labels = ["Linear.out"] * len(part.projections) + ["Linear.in"] + ["Parameter"] * len(part.tables)
    return CoupledGroup(part.path, "Attention:" + "|".join(labels), width, tuple(members), part.num_heads, heads)
