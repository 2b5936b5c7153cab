"""BatchNorm statistics of a cut network."""

from functools import partial
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn

from isoprune_hf.checkpoint.modeling_isoprune import IsoPruneForImageClassification
from isoprune_hf.errors import RecipeError
from isoprune_hf.pruning.calibration.calibration import Batches
from isoprune_hf.pruning.calibration.gradients import scoring_mode, sum_over_ranks
from isoprune_hf.pruning.graph.layers import BatchNorm


def recalibrate_batchnorm(
    pruned: IsoPruneForImageClassification, batches: Batches, accelerator: Accelerator | None = None
) -> tuple[str, ...]:
    """Give every BatchNorm, in place, the mean and variance of its inputs; a batch is normalised by its own meanwhile.

    Args:
        pruned: The cut network.
        batches: This rank's micro-batches: images (B, C, H, W), labels (B,).
        accelerator: Ranks that share the images.

    Returns:
        A line where there is no BatchNorm.

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

    def add(total: torch.Tensor, module: nn.Module, args: Any) -> None:
        x = args[0].double().transpose(0, 1).flatten(1)
        total += torch.stack([torch.full_like(x[:, 0], x.shape[1]), x.sum(1), x.square().sum(1)])

    handles = [module.register_forward_pre_hook(partial(add, sums[name])) for name, module in norms.items()]
    buffers = {name: value.clone() for name, value in pruned.model.named_buffers()}
    try:
        with scoring_mode(pruned, requires_grad=False), torch.no_grad():
            for module in norms.values():
                module.train()
            for images, _ in batches:
                pruned(pixel_values=images.to(pruned.device))
    finally:
        for handle in handles:
            handle.remove()
        for name, value in pruned.model.named_buffers():
            value.copy_(buffers[name])
    sums = sum_over_ranks(sums, accelerator)
    for name, module in norms.items():
        count, total, squares = sums[name]
        if not count.all():
            raise RecipeError("the calibration sample holds no image: prune.reconstruct needs at least one")
        mean = total / count
        module.running_mean.copy_(mean)
        module.running_var.copy_((squares / count - mean.square()).clamp(min=0) * count / (count - 1).clamp(min=1))
    return ()
