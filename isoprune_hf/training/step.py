"""The end of an update: whether loss and gradient are sound, clipping, and the step itself."""

import math
from typing import NamedTuple

import torch
from accelerate.logging import get_logger
from timm.utils import ModelEmaV3, adaptive_clip_grad
from torch import nn

from isoprune_hf.errors import DivergedError
from isoprune_hf.recipes import FinetuneRecipe

logger = get_logger(__name__)

# fp16 begins with a scale of 2^16: so many halvings in a row leave nothing of it, and nothing was learnt meanwhile.
_STORM = 24


class Step(NamedTuple):
    """What became of an update: the norm of its gradient before clipping, and why it was left out, if it was."""

    norm: float
    fault: str | None


def take_step(
    network: nn.Module,
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
    recipe: FinetuneRecipe,
    *,
    loss: float,
    ema: ModelEmaV3 | None,
    model: nn.Module,
) -> Step:
    """Step along the gradient of `network`, in place, and let `ema` follow `model`.

    Where the loss or the gradient is not finite, weights, optimizer and average stay as they are. The loss is that of
    all ranks and so is the gradient, so all ranks decide alike.
    """
    scaler.unscale_(optimizer)
    norm = clip_gradient(network, recipe)
    fault = None
    if not math.isfinite(loss):
        fault = f"the loss is {loss}"
    elif not math.isfinite(norm):
        fault = f"the norm of the gradient is {norm}"
    if fault is None:
        scaler.step(optimizer)
    scaler.update()  # which lowers the scale where the gradient was not finite
    if fault is None and ema is not None:
        ema.update(model)
    return Step(norm, fault)


def clip_gradient(network: nn.Module, recipe: FinetuneRecipe) -> float:
    """Clip the gradient in place as the recipe says; returns its norm before.

    Source:
        agc: Brock et al., High-performance large-scale image recognition without normalization, 2021 (arXiv
        2102.06171), eq. 3, by timm, which leaves the last layer out.
    """
    parameters = [parameter for parameter in network.parameters() if parameter.grad is not None]
    if recipe.clip_grad is not None and recipe.clip_mode == "norm":
        return nn.utils.clip_grad_norm_(parameters, recipe.clip_grad).item()
    norm = nn.utils.get_total_norm([parameter.grad for parameter in parameters]).item()
    if recipe.clip_grad is not None and recipe.clip_mode == "value":
        nn.utils.clip_grad_value_(parameters, recipe.clip_grad)
    elif recipe.clip_grad is not None:
        adaptive_clip_grad(parameters[:-2], recipe.clip_grad)
    return norm


def check_faults(fault: str, in_a_row: int, recipe: FinetuneRecipe, *, loss: float, place: str) -> None:
    """Warn of an update that was left out, on all ranks alike.

    Args:
        fault: Why it was.
        in_a_row: Such updates in a row, with this one.
        recipe: How many there may be.
        loss: Mean loss of the update.
        place: Where the training stands.

    Raises:
        DivergedError: There are too many. A gradient that overflows in fp16 is part of its way to a scale, so more of
            those may be.
    """
    if recipe.precision == "fp16" and math.isfinite(loss):
        if in_a_row > _STORM:
            raise DivergedError(
                f"finetune: {fault} at {place}, {in_a_row} times in a row: fp16 overflows whatever the loss is "
                "scaled by; set finetune.precision: bf16"
            )
        return
    if in_a_row > recipe.max_bad_steps:
        many = f", {in_a_row} times in a row" if recipe.max_bad_steps else ""
        raise DivergedError(
            f"finetune: {fault} at {place}{many}; lower finetune.learning_rate (now {recipe.learning_rate}), set "
            f"finetune.clip_grad (now {recipe.clip_grad}) or finetune.precision: no (now {recipe.precision})"
        )
    logger.warning(f"{fault} at {place}: it is left out ({in_a_row} of {recipe.max_bad_steps} in a row)")
