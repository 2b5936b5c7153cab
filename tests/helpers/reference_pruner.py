"""torch-pruning 1.6.1's own isomorphic pruner, called as the paper's scripts call it: the reference of the preset."""

import copy
from collections.abc import Mapping

import torch
import torch_pruning
from torch import nn

from isoprune_hf.checkpoint.modeling_isoprune import IsoPruneForImageClassification


def seeded_gradients(model: IsoPruneForImageClassification, seed: int) -> dict[str, torch.Tensor]:
    """Draw a gradient for each parameter; every layer has its own scale, so that layers differ."""
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.randn(p.shape, generator=generator) * (0.5 + torch.rand((), generator=generator))
        for name, p in model.model.named_parameters()
    }


def prune_with_torch_pruning(
    model: IsoPruneForImageClassification,
    gradients: Mapping[str, torch.Tensor],
    *,
    ratio: float,
    round_to: int | None,
    head_ratio: float = 0.0,
    head_dim_ratio: float | None = None,
) -> tuple[nn.Module, dict[str, int]]:
    """Prune a copy with the given gradients; return the copy and the numbers of heads of its attentions."""
    network = copy.deepcopy(model.model)
    for name, parameter in network.named_parameters():
        parameter.grad = gradients[name].clone()
    attentions = {
        name: module for name, module in network.named_modules() if isinstance(getattr(module, "qkv", None), nn.Linear)
    }
    classifiers = [
        layer
        for layer in network.modules()
        if isinstance(layer, nn.Linear) and layer.out_features == model.config.num_labels
    ]
    qkv = tuple(attention.qkv for attention in attentions.values())
    pruner = torch_pruning.pruner.BasePruner(
        network,
        example_inputs=torch.zeros(1, *model.config.image_size),
        importance=torch_pruning.importance.GroupTaylorImportance(),
        global_pruning=True,
        isomorphic=True,
        pruning_ratio=ratio,
        pruning_ratio_dict={qkv: head_dim_ratio} if head_dim_ratio is not None else {},
        ignored_layers=classifiers,
        num_heads={attention.qkv: attention.num_heads for attention in attentions.values()},
        prune_head_dims=True,
        prune_num_heads=True,
        head_pruning_ratio=head_ratio,
        round_to=round_to,
        # Its defaults are dictionaries that all pruners of a process share.
        in_channel_groups={},
        out_channel_groups={},
    )
    pruner.step()
    return network, {name: pruner.num_heads[attention.qkv] for name, attention in attentions.items()}
