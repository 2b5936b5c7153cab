"""`bn`: recompute the statistics of BatchNorm layers on the calibration images."""

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import nn

from isoprune_hf.checkpoint.modeling_isoprune import IsoPruneForImageClassification
from isoprune_hf.pruning.calibration.calibration import Calibration
from isoprune_hf.pruning.calibration.gradients import require_images, scoring_mode, sum_over_ranks, zero_images
from isoprune_hf.pruning.calibration.inputs import read_tensor
from isoprune_hf.pruning.graph.layers import BatchNorm
from isoprune_hf.pruning.plan import note_left
from isoprune_hf.pruning.repairing.repairs.task import RepairTask
from isoprune_hf.terminal import with_progress

_ROUNDING = 1e-10  # variance, relative to the squared mean, of inputs that differ by rounding alone


class BatchNormRepair:
    """Recompute mean and variance of every BatchNorm (see `recalibrate_batchnorm`)."""

    name = "bn"
    reads_images = True

    def repair(self, task: RepairTask) -> tuple[str, ...]:
        """Repair `task.pruned`, in place."""
        return recalibrate_batchnorm(task.pruned, task.calibration)


def recalibrate_batchnorm(pruned: IsoPruneForImageClassification, calibration: Calibration) -> tuple[str, ...]:
    """Set the statistics of every BatchNorm to mean and variance of its inputs, in place.

    A channel whose inputs are all equal keeps its variance.

    During the pass every BatchNorm normalizes a micro-batch by the statistics of this micro-batch.

    Args:
        pruned: The cut network.
        calibration: Images; float64 sums are reduced over ranks once.

    Returns:
        One line if the model has no BatchNorm, or a note on those that keep the statistics of the cut: they are not
        finite, or fewer than two values reach them.

    Raises:
        RecipeError: There is no image.
    """
    norms = {
        name: module
        for name, module in pruned.model.named_modules()
        if isinstance(module, BatchNorm) and module.running_mean is not None
    }
    if not norms:
        return ("prune.reconstruct bn changes nothing: the model has no BatchNorm",)
    left: dict[str, list[str]] = {}
    for name, sums in _sum_moments(pruned, norms, calibration).items():
        reason = _set_statistics(norms[name], *sums)
        if reason is not None:
            left.setdefault(reason, []).append(name)
    return note_left("left as cut by prune.reconstruct", "BatchNorm", left)


def _sum_moments(
    pruned: IsoPruneForImageClassification, norms: Mapping[str, nn.Module], calibration: Calibration
) -> dict[str, torch.Tensor]:
    """Sum the moments of the inputs of BatchNorms over the images of all ranks: name -> (3, channels).

    Raises:
        RecipeError: There is no image.
    """
    sums = {
        name: torch.zeros(3, len(module.get_buffer("running_mean")), dtype=torch.float64, device=pruned.device)
        for name, module in norms.items()
    }
    handles = [
        module.register_forward_pre_hook(partial(_add_moments, sums[name]), with_kwargs=True)
        for name, module in norms.items()
    ]
    buffers = {name: value.clone() for name, value in pruned.model.named_buffers()}
    images = zero_images(pruned)
    try:
        with scoring_mode(pruned, requires_grad=False), torch.no_grad():
            for module in norms.values():
                module.train()
            for pixel_values, labels in with_progress(
                calibration.batches, "repair, BatchNorm", "batch", rank=calibration.rank
            ):
                pruned(pixel_values=pixel_values.to(pruned.device))
                images += len(labels)
    finally:
        for handle in handles:
            handle.remove()
        for name, value in pruned.model.named_buffers():
            value.copy_(buffers[name])
    sums, images = sum_over_ranks((sums, images), calibration.accelerator)
    require_images(images, "prune.reconstruct")
    return sums


def _set_statistics(norm: nn.Module, count: torch.Tensor, total: torch.Tensor, squares: torch.Tensor) -> str | None:
    """Set mean and variance of a BatchNorm, in place, from sums over its inputs; return the reason if they stay."""
    if (count < 2).any():
        return "fewer than two values reach them"
    mean = total / count
    variance = (squares / count - mean.square()).clamp(min=0) * count / (count - 1).clamp(min=1)
    running_mean, running_var = norm.get_buffer("running_mean"), norm.get_buffer("running_var")
    # Other images than these would be divided by almost nothing.
    variance = torch.where(variance > _ROUNDING * mean.square(), variance, running_var)
    dtype = running_mean.dtype
    if not (mean.to(dtype).isfinite().all() and variance.to(dtype).isfinite().all()):
        return "their statistics are not finite"
    running_mean.copy_(mean)
    running_var.copy_(variance)
    return None


def _add_moments(sums: torch.Tensor, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
    """Add count, sum and sum of squares of each channel of a BatchNorm's input to `sums` (3, channels), in place.

    A micro-batch with one value for each channel has no statistics: the module then normalizes by those it has.
    """
    x = read_tensor(args, kwargs).double().transpose(0, 1).flatten(1)
    module.training = x.shape[1] > 1
    sums += torch.stack([torch.full_like(x[:, 0], x.shape[1]), x.sum(1), x.square().sum(1)])
