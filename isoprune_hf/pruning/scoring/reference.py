"""The parameters that torch-pruning 1.6.1 counts in a Taylor score; for parity alone."""

from collections.abc import Mapping

import torch
from torch import nn

from isoprune_hf.pruning.graph.layers import ConvNd


def counted_weights(base: nn.Module, weights: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Pick the parameters that count in torch-pruning's Taylor score.

    Those are the weights of linears, of convolutions that are not depthwise, and of LayerNorm: no biases, no
    BatchNorm or GroupNorm, no tokens, positions or layer scale.

    Source:
        torch_pruning 1.6.1, `GroupTaylorImportance` with its defaults (bias=False, its `target_types`).
    """
    layers = dict(base.named_modules())
    return {
        name: weight
        for name, weight in weights.items()
        if name.endswith(".weight") and _counts(layers[name.removesuffix(".weight")])
    }


def _counts(layer: nn.Module) -> bool:
    if isinstance(layer, ConvNd):
        return layer.groups == 1 or layer.groups != layer.out_channels
    return isinstance(layer, nn.Linear | nn.LayerNorm)
