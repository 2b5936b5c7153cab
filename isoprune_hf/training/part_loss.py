"""The loss of one part of a batch: pixels to the device, mixing, forward passes of student and teacher, loss."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import BaseImageProcessor

from isoprune_hf.data.augmentation import seed_from
from isoprune_hf.data.loading import ImageBatch
from isoprune_hf.data.pixels import normalised
from isoprune_hf.recipes import FinetuneRecipe
from isoprune_hf.training.acceleration import arrange, autocast
from isoprune_hf.training.distillation import HeadLogits, label_loss, training_loss
from isoprune_hf.training.mixing import mix
from isoprune_hf.training.teacher import TeacherOutputs

# Appended to (seed, epoch, update, part): the seeds of images have no fifth number, so no random numbers are shared.
_DROPOUT_STREAM = 1
_MIXING_STREAM = 2


@dataclass(frozen=True, eq=False)
class PartLoss:
    """Computes the summed loss of a part of a batch.

    Args:
        network: The student; may be compiled or wrapped.
        processor: Normalises pixels that the loader yields as uint8.
        recipe: The loss, the mixing and the precision.
        device: Device of the network.
        num_classes: Number of classes.
        is_multi_label: Each image has a list of classes.
        heads: Returns the logits of both heads of the last forward pass, if the teacher has a head of its own.
        teacher: Returns what the student learns from, if there is a teacher.
        taught_alone: The loss of a student without labels: returns the distances of its outputs from those of the
            teacher, (B,); None for a classifier.
    """

    network: nn.Module
    processor: BaseImageProcessor
    recipe: FinetuneRecipe
    device: torch.device
    num_classes: int
    is_multi_label: bool = False
    heads: HeadLogits | None = None
    teacher: TeacherOutputs | None = None
    taught_alone: Callable[[Sequence[Tensor], Sequence[Tensor]], Tensor] | None = None

    def __call__(self, batch: ImageBatch, seeds: tuple[int, ...]) -> Tensor:
        """Return the sum of the samples' losses.

        Args:
            batch: The part.
            seeds: Seed, epoch, update and part; dropout and mixing depend on nothing else.
        """
        recipe = self.recipe
        torch.manual_seed(seed_from(*seeds, _DROPOUT_STREAM))
        pixels = batch.pixels.to(self.device, non_blocking=True)
        labels = batch.labels.to(self.device, non_blocking=True)
        pixel_values, targets = mix(
            normalised(pixels, self.processor),
            labels,
            recipe,
            num_classes=self.num_classes,
            seeds=(*seeds, _MIXING_STREAM),
        )
        pixel_values = arrange(pixel_values, recipe)
        with autocast(self.device, recipe):
            output = self.network(pixel_values=pixel_values)
            wanted = None if self.teacher is None else self.teacher(pixel_values, batch.positions)
        if self.taught_alone is not None and wanted is not None:
            return self.taught_alone(output.outputs, wanted).sum()
        logits, taught_logits = (output.logits, None) if self.heads is None else self.heads()
        teacher_logits = None if wanted is None else wanted[0]
        if self.is_multi_label:
            return label_loss(
                logits,
                targets,
                teacher_logits,
                label_smoothing=recipe.label_smoothing,
                weight=recipe.distillation_weight,
                temperature=recipe.temperature,
                taught_logits=taught_logits,
            ).sum()
        return training_loss(
            logits,
            targets,
            teacher_logits,
            label_smoothing=recipe.label_smoothing,
            distillation=recipe.distillation,
            weight=recipe.distillation_weight,
            temperature=recipe.temperature,
            taught_logits=taught_logits,
            teacher_label_smoothing=recipe.teacher_label_smoothing,
        ).sum()
