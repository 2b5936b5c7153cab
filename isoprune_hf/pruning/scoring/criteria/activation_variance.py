"""`activation_variance`: variance of the activations that the layers after a group read."""

from collections.abc import Collection, Mapping
from functools import partial
from typing import Any

import torch
from torch import nn

from isoprune_hf.checkpoint.modeling_isoprune import IsoPruneForImageClassification
from isoprune_hf.pruning.calibration.calibration import Calibration
from isoprune_hf.pruning.calibration.gradients import (
    IMAGES,
    require_images,
    scoring_mode,
    sum_over_ranks,
    zero_images,
)
from isoprune_hf.pruning.calibration.inputs import first_tensor
from isoprune_hf.pruning.calibration.resumable import remaining
from isoprune_hf.pruning.groups import CoupledGroup
from isoprune_hf.pruning.scoring.criteria.criterion import RawScores, ScoringTask
from isoprune_hf.pruning.scoring.readers import ReadingLayer, find_readers, reading_layer
from isoprune_hf.pruning.scoring.reduction import combine_members, positions, score_each


class ActivationVariance:
    """Variance of a channel as the next layers read it, over images and positions.

    s_m(c) = sum over the positions of channel c in the input of a layer of the variances there, for every member m
    that is the weight of a linear or convolution that reads the channels (`find_reader`). So it is measured after norm
    and activation function: for the hidden channels of an MLP at its second linear, for attention at the output
    projection, for the residual stream at every layer that reads it, depthwise convolutions included.
    `score_batchnorm` has no effect.
    """

    name = "activation_variance"
    reads_images = True
    in_loss_units = False

    def score(self, task: ScoringTask) -> RawScores:
        """Score all groups and blocks of a task."""
        readers = {group.name: find_readers(task.model, group) for group in task.groups}
        layers = dict.fromkeys(reader.layer for found in readers.values() for reader in found)
        variances = input_variances(task.model, layers, task.calibration)

        def score(group: CoupledGroup) -> torch.Tensor:
            called = [reader for reader in readers[group.name] if reader.layer in variances]
            parts = [variances[reader.layer].cpu()[positions(reader.places)].sum(1) for reader in called]
            return combine_members(task, group.name, parts, "layer that reads its channels and is called")

        return score_each(task, score)


def input_variances(
    model: IsoPruneForImageClassification, layers: Collection[str], calibration: Calibration
) -> dict[str, torch.Tensor]:
    """Compute the variance of each input channel of each layer, over all images and positions of all ranks.

    Population variance E[x^2] - E[x]^2 from float64 sums of x and x^2, which are reduced over ranks once, at the end.
    Several ranks add in another order than one does, so the result may differ in the last digits of float64.

    Args:
        model: Its `model` contains the layers; restored afterwards.
        layers: Names of linears and convolutions, relative to `model.model`. Channels lie on the last dim of the input
            of a linear, and on dim 1 of that of a convolution; all other dims are samples and positions.
        calibration: Images; bf16 runs the forward pass under autocast.

    Returns:
        Layer -> variances of shape (channels,), float64; without layers that are never called, because the model uses
        their weights directly; nan where an activation is not finite.

    Raises:
        RecipeError: There is no image.
    """
    modules = {name: reading_layer(model, name) for name in layers}
    sums = {
        name: torch.zeros(3, _input_channels(module), dtype=torch.float64).to(model.device)
        for name, module in modules.items()
    }
    images = zero_images(model)
    handles = [
        module.register_forward_pre_hook(partial(_add_moments, sums[name]), with_kwargs=True)
        for name, module in modules.items()
    ]
    try:
        with scoring_mode(model, requires_grad=False), torch.no_grad():
            for pixel_values, labels in remaining({**sums, IMAGES: images}, calibration):
                pixel_values = pixel_values.to(model.device)
                is_bf16 = calibration.precision == "bf16"
                with torch.autocast(pixel_values.device.type, torch.bfloat16, enabled=is_bf16):
                    model(pixel_values=pixel_values)
                images += len(labels)
    finally:
        for handle in handles:
            handle.remove()
    sums, count = sum_over_ranks((sums, images), calibration.accelerator)
    require_images(count)
    return {
        name: (squares / number - (total / number) ** 2).clamp(min=0)
        for name, (number, total, squares) in sums.items()
        if number.any()
    }


def _input_channels(layer: ReadingLayer) -> int:
    return layer.in_features if isinstance(layer, nn.Linear) else layer.in_channels


def _add_moments(sums: torch.Tensor, layer: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
    """Add count, sum and sum of squares of each channel of a layer's input to `sums` (3, channels), in place."""
    inputs = first_tensor(args, kwargs)
    if inputs is None:  # counted as not called
        return
    channel = inputs.ndim - 1 if isinstance(layer, nn.Linear) else 1
    rest = [dim for dim in range(inputs.ndim) if dim != channel]
    sums[0] += inputs.numel() // inputs.shape[channel]
    sums[1] += inputs.sum(rest, dtype=torch.float64)
    sums[2] += torch.linalg.vector_norm(inputs, dim=rest, dtype=torch.float64).square()
