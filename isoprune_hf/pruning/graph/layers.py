"""Layer classes by kind, for `isinstance` checks and annotations, and properties of convolutions.

`torch.nn` has no public name for "a convolution of any number of dims". Its private base classes, as read in torch
2.14, are named in this module only.
"""

from typing import TypeGuard

from torch import nn

# Conv1d to Conv3d and their transposed counterparts.
ConvNd = nn.modules.conv._ConvNd
ConvTransposeNd = nn.modules.conv._ConvTransposeNd
# BatchNorm1d to BatchNorm3d and SyncBatchNorm.
BatchNorm = nn.modules.batchnorm._BatchNorm
# Norms that torch-pruning's engine and a copy without weights handle alike; nn.RMSNorm is not among them.
NORMS = (BatchNorm, nn.LayerNorm, nn.GroupNorm)
# Layers whose parameters belong to the layer in a signature; every other parameter is a loose one. `_NormBase` covers
# BatchNorm and InstanceNorm.
LAYERS = (nn.Linear, ConvNd, nn.modules.batchnorm._NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm, nn.PReLU)


def is_depthwise(layer: object) -> TypeGuard[ConvNd]:
    """Check whether a layer is a convolution with one input and one output channel per group."""
    return isinstance(layer, ConvNd) and 1 < layer.groups == layer.in_channels == layer.out_channels


def convolution_settings(layer: object) -> str:
    """Return the kernel, stride and groups of a convolution, as in a strict signature; empty for any other layer."""
    if not isinstance(layer, ConvNd):
        return ""
    kernel, stride = ("x".join(map(str, sizes)) for sizes in (layer.kernel_size, layer.stride))
    return f"(kernel {kernel}, stride {stride}, groups {'all' if is_depthwise(layer) else layer.groups})"
