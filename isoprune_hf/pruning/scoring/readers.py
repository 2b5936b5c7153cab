"""Variance of the activations that the layers after a group read, streamed over all images of all ranks."""

from collections.abc import Collection, Mapping
from functools import partial
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from torch import nn

from isoprune_hf.errors import RecipeError
from isoprune_hf.pruning.calibration.gradients import (
    IMAGES,
    Batches,
    Precision,
    check_finite,
    scoring_mode,
    sum_over_ranks,
    zero_images,
)
from isoprune_hf.pruning.calibration.resumable import left_for
from isoprune_hf.pruning.graph.layers import ConvNd
from isoprune_hf.pruning.groups import CoupledGroup, Member
from isoprune_hf.pruning.scoring.layer_squares import first_tensor


def input_variances(
    model: nn.Module,
    layers: Collection[str],
    batches: Batches,
    accelerator: Accelerator | None = None,
    precision: Precision = "no",
) -> dict[str, torch.Tensor]:
    """Take the variance of each input channel of each layer, over all images and positions of all ranks.

    Population variance E[x^2] - E[x]^2 from float64 sums of x and x^2, which are added over ranks once, at the end.
    Two ranks add in another order than one does, so the result may differ in the last digits of float64.

    Args:
        model: Its `model` holds the layers; left as it was.
        layers: Names of linears and convolutions, relative to `model.model`. Channels lie on the last dim of the input
            of a linear, and on dim 1 of that of a convolution; all other dims are samples and positions.
        batches: This rank's micro-batches: images (B, C, H, W), labels (B,).
        accelerator: Ranks that share the images.
        precision: bf16 runs the forward pass under autocast; the sums stay float64.

    Returns:
        Layer -> variances of shape (channels,), float64.

    Raises:
        RecipeError: There is no image, a layer is never called, or an activation is not finite.
    """
    modules = {name: model.model.get_submodule(name) for name in layers}
    sums = {name: torch.zeros(3, _input_channels(module), dtype=torch.float64) for name, module in modules.items()}
    sums = {name: total.to(model.device) for name, total in sums.items()}
    images = zero_images(model)
    handles = [
        module.register_forward_pre_hook(partial(_add, sums[name]), with_kwargs=True)
        for name, module in modules.items()
    ]
    try:
        with scoring_mode(model, requires_grad=False), torch.no_grad():
            for pixel_values, labels in left_for({**sums, IMAGES: images}, batches):
                pixel_values = pixel_values.to(model.device)
                with torch.autocast(pixel_values.device.type, torch.bfloat16, enabled=precision == "bf16"):
                    model(pixel_values=pixel_values)
                images += len(labels)
    finally:
        for handle in handles:
            handle.remove()
    sums, count = sum_over_ranks((sums, images), accelerator)
    if not count:
        raise RecipeError("the calibration sample holds no image: scoring needs at least one in the training split")
    check_finite(sums, "activations")
    for name, (number, _, _) in sums.items():
        if not number.any():
            raise RecipeError(
                f"criterion activation_variance cannot see what {name} reads, because the model uses its weight "
                "without calling it; take --prune.criterion taylor"
            )
    return {
        name: (squares / number - (total / number) ** 2).clamp(min=0)
        for name, (number, total, squares) in sums.items()
    }


def find_reader(model: nn.Module, member: Member) -> tuple[str, np.ndarray] | None:
    """Find the layer that reads the channels of a member, and where they lie in its input: (channels, k).

    A reader is a linear or a convolution whose weight has the channels on the side of its inputs. A depthwise
    convolution has them on dim 0, as many as it writes. In a grouped one a position on dim 1 stands for one channel in
    every group.
    """
    name, _, leaf = member.parameter.rpartition(".")
    layer = model.model.get_submodule(name)
    if leaf != "weight" or not isinstance(layer, (nn.Linear, ConvNd)):
        return None
    if isinstance(layer, nn.Linear):
        return (name, member.index) if member.dim == 1 else None
    if layer.groups == layer.in_channels == layer.out_channels and layer.groups > 1:
        return (name, member.index) if member.dim == 0 else None
    if member.dim != int(not layer.transposed):
        return None
    width = layer.in_channels // layer.groups
    starts = np.arange(layer.groups) * width if not layer.transposed else np.zeros(1, dtype=int)
    return name, (member.index[:, None, :] + starts[:, None]).reshape(len(member.index), -1)


def find_readers(model: nn.Module, group: CoupledGroup) -> list[tuple[str, np.ndarray]]:
    """Find all layers that read the channels of a group.

    Raises:
        RecipeError: There is none.
    """
    readers = [reader for reader in (find_reader(model, member) for member in group.members) if reader is not None]
    if not readers:
        raise RecipeError(
            f"criterion activation_variance finds no layer that reads the channels of {group.name}; take "
            "--prune.criterion taylor"
        )
    return readers


def _input_channels(layer: nn.Linear | ConvNd) -> int:
    return layer.in_features if isinstance(layer, nn.Linear) else layer.in_channels


def _add(total: torch.Tensor, layer: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
    """Add count, sum and sum of squares of each channel: (3, channels)."""
    inputs = first_tensor(args, kwargs)
    channel = inputs.ndim - 1 if isinstance(layer, nn.Linear) else 1
    rest = [dim for dim in range(inputs.ndim) if dim != channel]
    total[0] += inputs.numel() // inputs.shape[channel]
    total[1] += inputs.sum(rest, dtype=torch.float64)
    total[2] += torch.linalg.vector_norm(inputs, dim=rest, dtype=torch.float64).square()
