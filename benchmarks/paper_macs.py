"""Count multiply-accumulates as in published tables, like torch-pruning's `count_ops_and_params`.

Use it only to compare with those tables; `count_cost` is the exact count. This counter looks at the type of each
module and differs from the exact count as follows:

- Norms cost two operations per element, activations and pooling one, the bias of a convolution one per output; the
  bias of a linear layer costs one per output channel and call, for any number of tokens.
- Subclasses are not recognised: timm's own LayerNorm and GELU (ViT and ConvNeXt of timm 1.0) cost nothing. Tables made
  with an older timm include the norms of a ViT, 0.1 % of the total.
- Attention of timm is counted as one unit. Its output projection is counted with as many output channels as the heads
  have, which is too few if attention is narrower than the stream: 1.5 % of a DeiT-B pruned to 4.2 G.
- Attention of other libraries is counted by its linear layers only, without both matrix products.
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
    """Count multiply-accumulates for one image as published tables do, without reading the weights.

    Args:
        model: A base or pruned model; it is not changed.
        image_size: (channels, height, width) of the image; the default is that of the model.

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
    """Return the sum of a module and its children; children of a module counted as one unit are skipped."""
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
    """Count attention on an input of shape (windows or images, tokens, channels)."""
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
