"""How the same training takes less time and memory: memory format, compilation, recomputation, the teacher's type."""

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from transformers import BaseImageProcessor, PreTrainedModel

from isoprune_hf.data.pixels import normalisation
from isoprune_hf.errors import RecipeError
from isoprune_hf.recipes import FinetuneRecipe

PRECISIONS = {"bf16": torch.bfloat16, "fp16": torch.float16}


@contextmanager
def accelerated(model: nn.Module, recipe: FinetuneRecipe) -> Iterator[nn.Module]:
    """Inside the block, `model` has the recipe's memory format and recomputes activations; both are undone after it.

    Yields:
        What runs it: `model`, or its compiled form with the same parameters; what is for several ranks wraps it.

    Raises:
        RecipeError: The model cannot recompute its activations.
    """
    if recipe.channels_last:
        model.to(memory_format=torch.channels_last)
    if recipe.grad_checkpointing:
        _set_checkpointing(model, True)
    try:
        yield torch.compile(model) if recipe.torch_compile else model
    finally:
        if recipe.grad_checkpointing:
            _set_checkpointing(model, False)
        if recipe.channels_last:
            model.to(memory_format=torch.contiguous_format)


def arrange(pixel_values: Tensor, recipe: FinetuneRecipe) -> Tensor:
    """Give images (B, C, H, W) the recipe's memory format."""
    return pixel_values.contiguous(memory_format=torch.channels_last) if recipe.channels_last else pixel_values


def _set_checkpointing(model: nn.Module, is_on: bool) -> None:
    network = getattr(model, "model", model)
    if isinstance(network, PreTrainedModel) and network.supports_gradient_checkpointing:
        (network.gradient_checkpointing_enable if is_on else network.gradient_checkpointing_disable)()
    elif hasattr(network, "set_grad_checkpointing"):  # of timm
        network.set_grad_checkpointing(is_on)
    else:
        raise RecipeError(
            f"finetune.grad_checkpointing: {type(network).__name__} cannot recompute its activations; leave it out"
        )


class Teacher:
    """Gives logits; frozen, in eval mode, never wrapped and never saved.

    Args:
        model: Is moved to the device, frozen and put in eval mode; its weights stay as they are.
        recipe: Has its precision, memory format and compilation.
        device: Where it runs.
        processors: Of the student, whose pixels it gets, and its own, where it has another normalisation.
    """

    def __init__(
        self,
        model: nn.Module,
        recipe: FinetuneRecipe,
        *,
        device: torch.device,
        processors: tuple[BaseImageProcessor, BaseImageProcessor] | None = None,
    ):
        model.to(device).eval().requires_grad_(False)
        self._precision, self._device = recipe.teacher_precision, device
        self._dtype = PRECISIONS.get(recipe.teacher_precision, torch.float32)
        if self._dtype != torch.float32 or recipe.channels_last:
            model = copy.deepcopy(model)
            model.to(dtype=self._dtype)
        if recipe.channels_last:
            model.to(memory_format=torch.channels_last)
        self._network = torch.compile(model) if recipe.torch_compile else model
        self._renormalise = None if processors is None else _renormalisation(*processors, device=device)

    def __call__(self, pixel_values: Tensor, positions: Tensor | None = None) -> Tensor:
        """Return logits of shape (B, C) for the student's pixel values (B, 3, H, W), of whatever images."""
        with torch.inference_mode():
            if self._renormalise is not None:
                pixel_values = self._renormalise(pixel_values)
            if self._precision is None:  # as the student: within its autocast
                logits = self._network(pixel_values=pixel_values).logits
            else:
                with torch.autocast(self._device.type, enabled=False):
                    logits = self._network(pixel_values=pixel_values.to(self._dtype)).logits
        return logits.clone()  # one that the loss may keep for its backward pass


def _renormalisation(
    student: BaseImageProcessor, teacher: BaseImageProcessor, *, device: torch.device
) -> Callable[[Tensor], Tensor] | None:
    """Return what turns the pixels of one processor into those of another; None where they are the same."""
    values = [normalisation(processor) for processor in (student, teacher)]
    if values[0] == values[1]:
        return None
    (mean, std), (other_mean, other_std) = (
        [torch.tensor(numbers, device=device)[:, None, None] for numbers in pair] for pair in values
    )
    scale, shift = std / other_std, (mean - other_mean) / other_std
    return lambda pixel_values: pixel_values * scale + shift
