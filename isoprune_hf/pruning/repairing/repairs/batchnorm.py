"""`bn`: recompute the statistics of BatchNorm layers on the calibration images."""

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import nn

from isoprune_hf.checkpoint.modeling_isoprune import IsoPruneForImageClassification
from isoprune_hf.pruning.calibration.calibration import Calibration
from isoprune_hf.pruning.calibration.gradients import require_images, scoring_mode, sum_over_ranks
from isoprune_hf.pruning.calibration.inputs import read_tensor
from isoprune_hf.pruning.graph.layers import BatchNorm
from isoprune_hf.pruning.repairing.repairs.task import RepairTask


class BatchNormRepair:
    """Recompute mean and variance of every BatchNorm (see `recalibrate_batchnorm`)."""

    name = "bn"
    reads_images = True

    def repair(self, task: RepairTask) -> tuple[str, ...]:
        """Repair `task.pruned`, in place."""
        return recalibrate_batchnorm(task.pruned, task.calibration)


def recalibrate_batchnorm(pruned: IsoPruneForImageClassification, calibration: Calibration) -> tuple[str, ...]:
    """Set the statistics of every BatchNorm to mean and variance of its inputs, in place.

    During the pass every BatchNorm normalizes a micro-batch by the statistics of this micro-batch.

    Args:
        pruned: The cut network.
        calibration: Images; float64 sums are reduced over ranks once.

    Returns:
        One line if the model has no BatchNorm, or if statistics are not finite; those of the cut are then kept.

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
    sums = {
        name: torch.zeros(3, module.num_features, dtype=torch.float64, device=pruned.device)
        for name, module in norms.items()
    }
    handles = [
        module.register_forward_pre_hook(partial(_add_moments, sums[name]), with_kwargs=True)
        for name, module in norms.items()
    ]
    buffers = {name: value.clone() for name, value in pruned.model.named_buffers()}
    try:
        with scoring_mode(pruned, requires_grad=False), torch.no_grad():
            for module in norms.values():
                module.train()
            for images, _ in calibration.batches:
                pruned(pixel_values=images.to(pruned.device))
    finally:
        for handle in handles:
            handle.remove()
        for name, value in pruned.model.named_buffers():
            value.copy_(buffers[name])
    sums = sum_over_ranks(sums, calibration.accelerator)
    left = []
    for name, module in norms.items():
        count, total, squares = sums[name]
        require_images(count.all(), "prune.reconstruct")
        mean = total / count
        variance = (squares / count - mean.square()).clamp(min=0) * count / (count - 1).clamp(min=1)
        statistics = dict(module.named_buffers(recurse=False))
        dtype = statistics["running_mean"].dtype
        if not (mean.to(dtype).isfinite().all() and variance.to(dtype).isfinite().all()):
            left.append(name)
            continue
        statistics["running_mean"].copy_(mean)
        statistics["running_var"].copy_(variance)
    return (f"prune.reconstruct leaves {', '.join(left)} as cut: their statistics are not finite",) if left else ()


def _add_moments(sums: torch.Tensor, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
    """Add count, sum and sum of squares of each channel of a BatchNorm's input to `sums` (3, channels), in place."""
    x = read_tensor(args, kwargs).double().transpose(0, 1).flatten(1)
    sums += torch.stack([torch.full_like(x[:, 0], x.shape[1]), x.sum(1), x.square().sum(1)])
