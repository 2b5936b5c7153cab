"""Losses that need no labels, by the kind of outputs: `loss_without_labels`, with its targets in `DrawnBatches`."""

from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import torch
from torch import Size, Tensor, nn

from isoprune_hf.checkpoint.task_forms import OBJECT_DETECTION, TaskForm, task_of
from isoprune_hf.errors import CheckpointError
from isoprune_hf.models.detection_loss import DetectionLoss
from isoprune_hf.models.feature_loss import FEATURES
from isoprune_hf.models.held import HeldModel, output_shapes, require_repeatable
from isoprune_hf.models.objective import Objective
from isoprune_hf.models.pixel_loss import PIXEL_CLASSES


class DrawnObjective(Objective, Protocol):
    """A loss whose targets are random numbers, the same for the same pixels in any batch and on any rank."""

    def draw_targets(self, images: Tensor, shapes: Sequence[Size]) -> Tensor:
        """Return the targets of images.

        Args:
            images: (B, C, H, W).
            shapes: Shapes of the outputs of the network without the dim of the batch.
        """


def loss_without_labels(form: TaskForm, classes: int | None = None) -> DrawnObjective:
    """Return the loss of a network whose outputs are boxes, or logits of classes, or else values of any kind.

    Args:
        form: The task of the network.
        classes: The number of classes, if it has any.
    """
    if form is OBJECT_DETECTION:
        return DetectionLoss(classes or 1)
    return PIXEL_CLASSES if form.names_classes else FEATURES


def held(model: nn.Module) -> HeldModel:
    """Return a network of a task without labels, as `load_base` opens it.

    Raises:
        CheckpointError: It is held with no loss.
    """
    if not isinstance(model, HeldModel):
        raise CheckpointError(f"{type(model).__name__} is not held with a loss; open the folder with load_base")
    return model


def draw_for(batches: Any, model: HeldModel) -> "DrawnBatches":
    """Return micro-batches of images with the targets of a network in place of their labels, see `DrawnBatches`.

    Raises:
        UnsupportedArchitectureError: The outputs of the network are random.
    """
    require_repeatable(model)
    shapes = [torch.Size(shape) for shape in output_shapes(model)]
    objective = loss_without_labels(task_of(model.config.base), model.config.num_labels)
    return DrawnBatches(batches, objective, shapes)


class DrawnBatches:
    """Micro-batches of images with drawn targets in place of their labels.

    Args:
        batches: Micro-batches of images and labels, in the same order in every pass.
        objective: Draws the targets.
        shapes: Shapes of the outputs without the dim of the batch.
    """

    def __init__(self, batches: Any, objective: DrawnObjective, shapes: Sequence[Size]):
        self._batches = batches
        self._objective = objective
        self._shapes = tuple(shapes)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return self.starting_at(0)

    def __len__(self) -> int:
        return len(self._batches)

    def starting_at(self, number: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Iterate from micro-batch `number` on."""
        for images, _ in self._batches.starting_at(number):
            yield images, self._objective.draw_targets(images, self._shapes)
