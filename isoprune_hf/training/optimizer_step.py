"""The optimizer step at the end of an update: checks for finite values, gradient clipping, and the step itself."""

import math
from typing import NamedTuple

import torch
from accelerate.logging import get_logger
from timm.utils.agc import adaptive_clip_grad
from torch import nn

from isoprune_hf.errors import DivergedError
from isoprune_hf.recipes import FinetuneRecipe

logger = get_logger(__name__)

# The scale of fp16 starts at 2^16; after this many halvings in a row it is negligible, and no step was made.
_MAX_OVERFLOWS_IN_A_ROW = 24


class Step(NamedTuple):
    """Result of an optimizer step.

    Args:
        norm: Norm of the gradient before clipping.
        fault: Reason why the step was skipped, or None.
    """

    norm: float
    fault: str | None


def take_step(
    network: nn.Module,
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
    recipe: FinetuneRecipe,
    *,
    loss: float,
) -> Step:
    """Update the weights of `network` along its gradient in place.

    If the loss or the gradient is not finite, weights and optimizer stay unchanged. Loss and gradient are those of all
    ranks, so all ranks take the same decision.
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
    scaler.update()  # lowers the scale if the gradient was not finite
    return Step(norm, fault)


def clip_gradient(network: nn.Module, recipe: FinetuneRecipe) -> float:
    """Clip the gradient in place by the recipe, and return its norm before clipping.

    Source:
        agc: Brock et al., High-performance large-scale image recognition without normalization, 2021 (arXiv
        2102.06171), eq. 3, as implemented in timm, which excludes the last layer.
    """
    parameters = [parameter for parameter in network.parameters() if parameter.grad is not None]
    if recipe.clip_grad is not None and recipe.clip_mode == "norm":
        return nn.utils.clip_grad_norm_(parameters, recipe.clip_grad).item()
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    norm = nn.utils.get_total_norm(gradients).item()
    if recipe.clip_grad is not None and recipe.clip_mode == "value":
        nn.utils.clip_grad_value_(parameters, recipe.clip_grad)
    elif recipe.clip_grad is not None:
        adaptive_clip_grad(parameters[:-2], recipe.clip_grad)  # type: ignore[no-untyped-call]  # timm
    return norm


def check_faults(fault: str, in_a_row: int, recipe: FinetuneRecipe, *, loss: float, place: str) -> None:
    """Warn about a skipped update, or raise if there were too many; the same on all ranks.

    Args:
        fault: Why the update was skipped.
        in_a_row: Number of consecutive skipped updates, including this one.
        recipe: Contains the maximum, `max_bad_steps`.
        loss: Mean loss of the update.
        place: Update and epoch, for the message.

    Raises:
        DivergedError: Too many updates in a row were skipped. Gradients that overflow in fp16 are normal until the
            scale is found, so more of them are allowed.
    """
    if recipe.precision == "fp16" and math.isfinite(loss):
        if in_a_row > _MAX_OVERFLOWS_IN_A_ROW:
            raise DivergedError(
                f"finetune: {fault} at {place}, {in_a_row} times in a row: fp16 overflows at any loss scale; set "
                "finetune.precision: bf16"
            )
        return
    if in_a_row > recipe.max_bad_steps:
        repeated = f", {in_a_row} times in a row" if recipe.max_bad_steps else ""
        raise DivergedError(
            f"finetune: {fault} at {place}{repeated}; lower finetune.learning_rate (now {recipe.learning_rate}), set "
            f"finetune.clip_grad (now {recipe.clip_grad}) or finetune.precision: no (now {recipe.precision})"
        )
    logger.warning(f"{fault} at {place}: the update is skipped ({in_a_row} of {recipe.max_bad_steps} in a row)")
