"""Coupled groups from torch-pruning's own `get_all_groups`, an independent reference for `trace_groups`."""

import math

import numpy as np
import torch
import torch_pruning
from torch import nn

from isoprune_hf.checkpoint.modeling_isoprune import IsoPruneForImageClassification
from isoprune_hf.checkpoint.structure import meta_copy
from isoprune_hf.pruning.graph.torch_pruning.architectures import Attention
from isoprune_hf.pruning.graph.torch_pruning.stand_ins import loose_parameters, traced_copy

# A group as plain values: name, signature, channels, [(parameter, dim, positions of each channel)].
PlainGroup = tuple[str, str, int, list[tuple[str, int, list[list[int]]]]]


def reference_groups(model: IsoPruneForImageClassification) -> list[PlainGroup]:
    """Return the groups of torch-pruning except those of attention, with real norms and activations."""
    network = meta_copy(model).model.requires_grad_(True)
    traced = traced_copy(model.model)
    for name in traced.stubs:
        path = name.removesuffix(".linear")
        network.set_submodule(path, traced.network.get_submodule(path))
    graph = torch_pruning.DependencyGraph()
    graph.build_dependency(
        network,
        example_inputs=(torch.zeros(1, *model.config.image_size, device="meta"),),
        output_transform=lambda output: output if isinstance(output, torch.Tensor) else output.logits,
        unwrapped_parameters=loose_parameters(network),
        verbose=False,
    )
    names = {owner: name for name, owner in [*network.named_modules(), *network.named_parameters()]}
    order = {name: position for position, (name, _) in enumerate(network.named_modules())}
    found = [read_group(graph, group, names, order, traced.stubs) for group in graph.get_all_groups()]
    place = {name: position for position, (name, _) in enumerate(model.model.named_modules())}
    return sorted((group for group in found if group is not None), key=lambda group: place[group[0]])


def read_group(graph, group, names, order, stubs) -> PlainGroup | None:
    """Convert a group of torch-pruning; None for the outputs of the network, which no layer reads."""
    channels, ways, entries, is_read = len(group[0].idxs), 1, [], False
    for number in range(len(group)):
        item = group[number]
        layer = item.dep.target.module
        if layer not in names:
            continue
        name, rows = names[layer], [[] for _ in range(channels)]
        for root, position in zip(item.root_idxs, item.idxs, strict=True):
            rows[root].append(position)
        if isinstance(layer, nn.Parameter):
            entries.append((order[name.rpartition(".")[0]], "Parameter", [(name, item.dep.target.pruning_dim, rows)]))
            continue
        handler = item.dep.handler
        reads = graph.is_in_channel_pruning_fn(handler) and not graph.is_out_channel_pruning_fn(handler)
        is_read = is_read or reads
        groups = getattr(layer, "groups", 1)
        depthwise = 1 < groups == layer.in_channels == layer.out_channels if groups > 1 else False
        if (groups > 1 and not depthwise) or isinstance(layer, nn.GroupNorm):
            ways = math.lcm(ways, groups if groups > 1 else layer.num_groups)
        if reads and groups > 1:
            rows = [[position % (layer.in_channels // groups) for position in row] for row in rows]
        side = "in" if reads else "depthwise" if depthwise else "out"
        entries.append((order[name], f"{type(layer).__name__}.{side}", elements(name, layer, rows, reads, stubs)))
    if not is_read or channels % ways:
        return None
    entries.sort(key=lambda entry: entry[0])
    step, merged = channels // ways, {}
    for parameter, dim, rows in (column for _, _, columns in entries for column in columns):
        sets = merged.setdefault((parameter, dim), [set() for _ in range(step)])
        for channel, row in enumerate(rows):
            sets[channel % step].update(row)
    writer = next(columns[0][0] for _, label, columns in entries if label.endswith(".out"))
    members = [(*key, [sorted(positions) for positions in rows]) for key, rows in merged.items()]
    return writer.removesuffix(".weight"), "|".join(label for _, label, _ in entries), step, members


def elements(name, layer, rows, reads, stubs):
    """Return (parameter, dim, rows) for each parameter of one side of a layer, or of the part that it replaces."""
    part = stubs.get(name)
    if not reads:
        leaves = [leaf for leaf, tensor in layer.state_dict(keep_vars=True).items() if tensor.ndim > 0]
        if part is not None:
            name, leaves = part.output if isinstance(part, Attention) else part.reduction, part.written
        return [(f"{name}.{leaf}", 0, rows) for leaf in leaves]
    if isinstance(part, Attention):
        return [(f"{projection}.weight", 1, rows) for projection in part.projections]
    if part is not None:
        copies = [[copy * layer.in_features + position for copy in range(4) for position in row] for row in rows]
        vectors = [(f"{part.norm}.{leaf}", 0, copies) for leaf in ("weight", "bias")]
        return [*vectors, (f"{part.reduction}.weight", 1, copies)]
    return [(f"{name}.weight", 1, rows)]


def plain_groups(groups) -> list[PlainGroup]:
    """Return groups of `trace_groups` as plain values, except those of attention."""
    return [
        (g.name, g.signature, g.channels, [(m.parameter, m.dim, np.asarray(m.index).tolist()) for m in g.members])
        for g in groups
        if not g.num_heads
    ]
