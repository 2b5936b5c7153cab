"""The teacher of a distillation, computed for each batch; `teacher_cache.py` reads its logits from files instead."""

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor, nn
from transformers import BaseImageProcessor

from isoprune_hf.checkpoint.image_processor import channels_of
from isoprune_hf.data.pixels import normalisation
from isoprune_hf.errors import RecipeError
from isoprune_hf.models.held import reads_labels
from isoprune_hf.recipes import FinetuneRecipe
from isoprune_hf.training.acceleration import PRECISIONS

# Returns what a student learns from, for its pixel values (B, channels, H, W) and the positions of the images (B,):
# the logits (B, C), or all outputs (B, ...) of a network without classes.
TeacherOutputs = Callable[[Tensor, Tensor], tuple[Tensor, ...]]


class TeacherModel(NamedTuple):
    """A teacher as the caller passes it.

    Args:
        model: Returns logits of the student's classes, or the outputs of a `HeldModel` that reads no labels.
        processor: Its image processor; None if it normalises as the student does.
    """

    model: nn.Module
    processor: BaseImageProcessor | None = None


@contextmanager
def lent_teacher(model: nn.Module | None) -> Iterator[None]:
    """Restore the modes of the modules of a teacher, and the `requires_grad` of its parameters, after the block."""
    modes = [] if model is None else [(module, module.training) for module in model.modules()]
    flags = [] if model is None else [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode
        for parameter, flag in flags:
            parameter.requires_grad_(flag)


class Teacher:
    """Computes the outputs of a teacher, which is frozen, in eval mode, never wrapped and never saved.

    Args:
        model: Moved to the device, frozen and put in eval mode; its weights stay unchanged.
        recipe: Precision, memory format and compilation.
        device: Device that it runs on.
        processors: The image processors of the student, whose pixels it receives, and of the teacher, if these may
            normalise differently.
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
        self._gives_all = not reads_labels(model)
        self._precision = recipe.teacher_precision
        self._device = device
        self._dtype = PRECISIONS.get(recipe.teacher_precision or "no", torch.float32)
        if self._dtype != torch.float32 or recipe.channels_last:
            model = copy.deepcopy(model)
            model.to(dtype=self._dtype)
        if recipe.channels_last:
            model.to(memory_format=torch.channels_last)
        self._network = torch.compile(model) if recipe.torch_compile else model
        self._renormalise = None if processors is None else _renormalisation(*processors, device=device)

    def __call__(self, pixel_values: Tensor, positions: Tensor | None = None) -> tuple[Tensor, ...]:
        """Return the logits (B, C), or all outputs of a network without labels, see `TeacherOutputs`.

        Args:
            pixel_values: Those of the student, (B, channels, H, W).
            positions: Not needed.
        """
        with torch.inference_mode():
            if self._renormalise is not None:
                pixel_values = self._renormalise(pixel_values)
            if self._precision is None:  # that of the student: run within its autocast
                output = self._network(pixel_values=pixel_values)
            else:
                with torch.autocast(self._device.type, enabled=False):
                    output = self._network(pixel_values=pixel_values.to(self._dtype))
        found = output.outputs if self._gives_all else (output.logits,)
        return tuple(
            value.clone() for value in found
        )  # outside inference mode: the loss may save them for its gradient


def _renormalisation(
    student: BaseImageProcessor, teacher: BaseImageProcessor, *, device: torch.device
) -> Callable[[Tensor], Tensor] | None:
    """Return a function from the student's pixel values to the teacher's, or None if both are the same.

    A grey image (B, 1, H, W) becomes the RGB image that a teacher of RGB images reads.

    Raises:
        RecipeError: The teacher reads other channels, which the student's images do not have.
    """
    channels, teacher_channels = channels_of(student), channels_of(teacher)
    if channels != teacher_channels and (channels, teacher_channels) != (1, 3):
        raise RecipeError(
            f"finetune.teacher: the teacher reads images of {teacher_channels} channels, the student of {channels}; "
            "choose another teacher, or set finetune.distillation: none"
        )
    student_values, teacher_values = normalisation(student), normalisation(teacher)
    if student_values == teacher_values:
        return None
    mean, std = (torch.tensor(numbers, device=device)[:, None, None] for numbers in student_values)
    teacher_mean, teacher_std = (torch.tensor(numbers, device=device)[:, None, None] for numbers in teacher_values)
    scale = std / teacher_std
    shift = (mean - teacher_mean) / teacher_std
    return lambda pixel_values: pixel_values * scale + shift
