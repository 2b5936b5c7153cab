"""How near the depths of pixels are to those of the dense network: the measures of `DEPTH_MEASURES`."""

from collections.abc import Mapping, Sequence
from types import MappingProxyType

import torch
from torch import Tensor

from isoprune_hf.evaluation.comparing import Measure

_NEAR = 1.25  # times


def near_depths(outputs: Sequence[Tensor], wanted: Sequence[Tensor]) -> Tensor:
    """Return the share of the pixels of each image whose depth is less than 1.25 times off, (B,).

    Args:
        outputs: Depths first, (B, H, W).
        wanted: Those of the dense network.

    Source:
        Eigen et al., Depth map prediction from a single image, NeurIPS 2014, section 4.2, with the dense depths.
    """
    found, target = outputs[0].flatten(1).double(), wanted[0].flatten(1).double()
    # Without a division, so that depths of 0 are near to themselves alone.
    is_near = (found <= _NEAR * target) & (target <= _NEAR * found)
    return is_near.double().mean(1)


def depth_difference(outputs: Sequence[Tensor], wanted: Sequence[Tensor]) -> Tensor:
    """Return the mean absolute difference of the depths of each image over their mean absolute value, (B,).

    Args:
        outputs: Depths first, (B, H, W).
        wanted: Those of the dense network. Relative depths may be 0, so their mean is divided by, not each of them.
    """
    found, target = outputs[0].flatten(1).double(), wanted[0].flatten(1).double()
    size = target.abs().mean(1).clamp(min=torch.finfo(torch.float32).tiny)
    return (found - target).abs().mean(1) / size


DEPTH_MEASURES: Mapping[str, Measure] = MappingProxyType({"delta1": near_depths, "depth_difference": depth_difference})
