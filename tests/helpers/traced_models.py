"""Models of timm by name, and copies with permuted channels."""

import copy

import numpy as np
import torch

from isoprune_hf.checkpoint.modeling_isoprune import IsoPruneConfig, IsoPruneForImageClassification
from isoprune_hf.pruning.graph.find_groups import trace_groups


def make_timm(architecture: str, image_size: int = 32, **args: object) -> IsoPruneForImageClassification:
    base = {"library": "timm", "architecture": architecture, "args": args}
    return IsoPruneForImageClassification(
        IsoPruneConfig(base=base, num_labels=7, image_size=[3, image_size, image_size])
    ).eval()


def shuffle(model: IsoPruneForImageClassification) -> IsoPruneForImageClassification:
    """Permute the channels of every group, in all members alike."""
    generator = np.random.default_rng(0)
    shuffled = copy.deepcopy(model)
    tensors = dict(shuffled.model.state_dict())
    for group in trace_groups(model):
        heads, dims = max(group.num_heads, 1), group.head_dim or group.channels
        order_of_heads = generator.permutation(heads)
        # Dims are permuted within each head; queries, keys and values of a head move together.
        channels = np.concatenate([head * dims + generator.permutation(dims) for head in order_of_heads])
        for member, order in [
            *((m, channels) for m in group.members),
            *((m, order_of_heads) for m in group.head_members),
        ]:
            tensor = tensors[member.parameter]
            positions = torch.arange(tensor.shape[member.dim])
            positions[torch.from_numpy(member.index)] = torch.from_numpy(member.index[order])
            tensor.copy_(tensor.clone().index_select(member.dim, positions))
    return shuffled
