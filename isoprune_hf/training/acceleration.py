"""Save time and memory in training: mixed precision, memory format, compilation, gradient checkpointing."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from isoprune_hf.errors import RecipeError
from isoprune_hf.recipes import FinetuneRecipe

PRECISIONS = {"bf16": torch.bfloat16, "fp16": torch.float16}


def float64_device(device: torch.device) -> torch.device:
    """Return the device for sums in float64: `device`, or the CPU if `device` has no float64 (Apple's MPS)."""
    return torch.device("cpu") if device.type == "mps" else device


def autocast(device: torch.device, recipe: FinetuneRecipe) -> torch.autocast:
    """Return the autocast of the recipe's precision, disabled for fp32."""
    return torch.autocast(device.type, PRECISIONS.get(recipe.precision), enabled=recipe.precision in PRECISIONS)


@contextmanager
def accelerated(model: nn.Module, recipe: FinetuneRecipe) -> Iterator[nn.Module]:
    """Set memory format and gradient checkpointing of `model` inside the block, in place, and undo both after it.

    Yields:
        `model`, or its compiled form with the same parameters.

    Raises:
        RecipeError: The model does not support gradient checkpointing.
    """
    if recipe.channels_last:
        model.to(memory_format=torch.channels_last)
    if recipe.grad_checkpointing:
        _set_checkpointing(model, enabled=True)
    try:
        yield cast(nn.Module, torch.compile(model)) if recipe.torch_compile else model  # of a module, a module
    finally:
        if recipe.grad_checkpointing:
            _set_checkpointing(model, enabled=False)
        if recipe.channels_last:
            model.to(memory_format=torch.contiguous_format)


def arrange(pixel_values: Tensor, recipe: FinetuneRecipe) -> Tensor:
    """Return images (B, C, H, W) in the recipe's memory format."""
    return pixel_values.contiguous(memory_format=torch.channels_last) if recipe.channels_last else pixel_values


def _set_checkpointing(model: nn.Module, *, enabled: bool) -> None:
    network = getattr(model, "model", model)
    if isinstance(network, PreTrainedModel) and network.supports_gradient_checkpointing:
        if enabled:
            network.gradient_checkpointing_enable()  # type: ignore[no-untyped-call]  # transformers
        else:
            network.gradient_checkpointing_disable()  # type: ignore[no-untyped-call]  # transformers
    elif callable(setter := getattr(network, "set_grad_checkpointing", None)):  # timm
        setter(enabled)
    else:
        raise RecipeError(
            f"finetune.grad_checkpointing: {type(network).__name__} does not support gradient checkpointing; set it "
            "to false"
        )
