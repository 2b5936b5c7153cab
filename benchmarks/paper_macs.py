"""The counter of published tables: multiply-accumulates as torch-pruning's `count_ops_and_params` counts them.

To compare with those tables, and for nothing else: `cost.py` has the exact count. This one goes by the type of a
module and so differs from it, in what it adds and in what it does not see:

- Norms cost two operations an element, activations and pooling one, the bias of a convolution one for each output;
  that of a linear layer one for each output channel in a call, however many tokens there are.
- A subclass is another type: LayerNorm and GELU of timm's own (ViT and ConvNeXt of timm 1.0) cost nothing. Tables
  that were made with an older timm hold the norms of a ViT, 0.1 % of it.
- Attention of timm is counted as a whole. Its output projection counts as if it wrote as many channels as the heads
  have: too little where attention is narrower than the stream, 1.5 % of a DeiT-B that is cut to 4.2 G.
- Attention of other libraries costs its linear layers, without both products.
"""

import math
from collections.abc import Callable, Sequence
from functools import partial

import torch
from timm.models.swin_transformer import WindowAttention
from timm.models.vision_transformer import Attention
from torch import nn

from isoprune_hf.checkpoint.modeling_isoprune import IsoPruneForImageClassification
from isoprune_hf.pruning.graph.copying import copy_simplified

Count = Callable[[nn.Module, torch.Tensor, torch.Tensor], int]


def paper_macs(model: IsoPruneForImageClassification, image_size: Sequence[int] | None = None) -> int:
    """Count multiply-accumulates for one image as published tables do; the model's weights are not read.

    Args:
        model: A base or pruned model that runs.
        image_size: (channels, height, width) of the image; the default is the model's own.

    Source:
        torch-pruning 1.6.1, `torch_pruning/utils/op_counter.py`, without its recurrent layers.
    """
    network = copy_simplified(model.model)
    counts: dict[nn.Module, int] = {}
    for module in network.modules():
        if type(module) in _COUNTS:
            module.register_forward_hook(partial(_add, counts))
    with torch.no_grad():
        network(torch.zeros(1, *(image_size or model.config.image_size), device="meta"))
    return _sum(network, counts)


def _add(counts: dict[nn.Module, int], module: nn.Module, inputs: tuple[torch.Tensor, ...], output: object) -> None:
    counts[module] = counts.get(module, 0) + _COUNTS[type(module)](module, inputs[0], output)


def _sum(module: nn.Module, counts: dict[nn.Module, int]) -> int:
    """Sum below a module; what is inside of one that is counted as a whole is not counted again."""
    if type(module) in _COUNTS:
        return counts.get(module, 0)
    return sum(_sum(child, counts) for child in module.children())


def _linear(module: nn.Linear, given: torch.Tensor, output: torch.Tensor) -> int:
    return given.numel() * output.shape[-1] + (0 if module.bias is None else output.shape[-1])


def _convolution(module: nn.modules.conv._ConvNd, given: torch.Tensor, output: torch.Tensor) -> int:
    places = given.shape[0] * math.prod(output.shape[2:])
    products = math.prod(module.kernel_size) * module.in_channels * (module.out_channels // module.groups)
    return places * (products + (0 if module.bias is None else module.out_channels))


def _attention(module: nn.Module, given: torch.Tensor, output: object) -> int:
    """Attention of (windows or images, tokens, channels)."""
    batch, tokens, channels = given.shape
    width = module.qkv.out_features // 3
    projections = 3 * tokens * channels * width + (0 if module.qkv.bias is None else 3 * tokens * width)
    products = module.num_heads * tokens * tokens * (2 * (width // module.num_heads) + 1)  # 1: softmax
    return batch * (tokens * width + projections + products + tokens * width * (width + 1))


def _norm(module: nn.Module, given: torch.Tensor, output: torch.Tensor) -> int:
    is_affine = module.elementwise_affine if isinstance(module, nn.LayerNorm) else module.affine
    return given.numel() * (2 if is_affine else 1)


def _each_input(module: nn.Module, given: torch.Tensor, output: torch.Tensor) -> int:
    return given.numel()


def _each_output(module: nn.Module, given: torch.Tensor, output: torch.Tensor) -> int:
    return output.numel()


_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_NORMS = (
    *(nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.GroupNorm, nn.LayerNorm),
    *(nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d),
)
_POOLINGS = (
    *(nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d, nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d),
    *(nn.AdaptiveMaxPool1d, nn.AdaptiveMaxPool2d, nn.AdaptiveMaxPool3d),
    *(nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d),
)
_ACTIVATIONS = (nn.ReLU, nn.ReLU6, nn.PReLU, nn.ELU, nn.LeakyReLU, nn.GELU, nn.Upsample)
_COUNTS: dict[type[nn.Module], Count] = {
    nn.Linear: _linear,
    Attention: _attention,
    WindowAttention: _attention,
    **dict.fromkeys(_CONVOLUTIONS, _convolution),
    **dict.fromkeys(_NORMS, _norm),
    **dict.fromkeys(_POOLINGS, _each_input),
    **dict.fromkeys(_ACTIVATIONS, _each_output),
}
