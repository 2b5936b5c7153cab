"""The model in training with its optimizer: gradients of an update, and the step along them; see `open_student`."""

import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import NamedTuple

import torch
from accelerate import Accelerator
from timm.utils.model_ema import ModelEmaV3
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from transformers import BaseImageProcessor

from isoprune_hf.data.loading import ImageBatch
from isoprune_hf.models.held import HeldModel, reads_labels
from isoprune_hf.recipes import FinetuneRecipe
from isoprune_hf.training.acceleration import accelerated
from isoprune_hf.training.distillation import distillation_heads
from isoprune_hf.training.optimisation import build_optimizer
from isoprune_hf.training.optimizer_step import Step, take_step
from isoprune_hf.training.part_loss import PartLoss
from isoprune_hf.training.regularisation import regularised
from isoprune_hf.training.replicas import AveragedStatistics
from isoprune_hf.training.teacher import TeacherOutputs
from isoprune_hf.training.unreached import frozen_unreached


class Part(NamedTuple):
    """A part of an update on this rank.

    Args:
        seeds: Seed, epoch, update and part.
        counts: Whether its samples count; see `TrainBatches.sizes`.
    """

    seeds: tuple[int, ...]
    counts: bool


class PartSums(NamedTuple):
    """Sums over this rank's parts of an update.

    Args:
        loss: Sum of the losses of the samples that count.
        broken: Positions of the images that could not be read.
        waited: Seconds of waiting for data.
    """

    loss: Tensor
    broken: list[int]
    waited: float


@dataclass(frozen=True, eq=False)
class Student:
    """A model and everything that an update changes or needs.

    Args:
        model: The model that is trained.
        network: `model`, compiled if the recipe says so, and wrapped if there are several ranks.
        ema: Moving average of the weights, if the recipe has one.
        part_loss: Loss of one part of a batch.
        optimizer: Over the parameters of `model`.
        scaler: Scales the loss in fp16.
        statistics: Running statistics of BatchNorm.
        recipe: How to train.
        accelerator: The ranks.
    """

    model: nn.Module
    network: nn.Module
    ema: ModelEmaV3 | None
    part_loss: PartLoss
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    statistics: AveragedStatistics
    recipe: FinetuneRecipe
    accelerator: Accelerator

    def add_gradients(self, stream: Iterator[ImageBatch], parts: Iterable[Part], *, samples: int) -> PartSums:
        """Compute the gradient of an update: zero it, then add this rank's parts.

        Args:
            stream: The batches of the parts.
            parts: This rank's parts.
            samples: Samples of the update over all ranks.
        """
        parts, world = list(parts), self.accelerator.num_processes
        self.optimizer.zero_grad()
        self.statistics.begin()
        loss_sum = torch.zeros((), device=self.accelerator.device)
        broken: list[int] = []
        waited = 0.0
        for number, part in enumerate(parts, start=1):
            asked = time.perf_counter()
            batch = next(stream)
            waited += time.perf_counter() - asked
            broken += batch.broken
            with nullcontext() if number == len(parts) else self.accelerator.no_sync(self.network):
                loss = self.part_loss(batch, part.seeds) * part.counts
                self.statistics.add(counts=part.counts)
                # The ranks' gradients are averaged, so `world` times a share of the global mean gives the mean.
                self.scaler.scale(loss * (world / samples)).backward()
            self.statistics.undo()
            loss_sum += loss.detach()
        self.statistics.end()
        return PartSums(loss_sum, broken, waited)

    def step(self, lr: float, *, loss: float) -> Step:
        """Make the optimizer step, unless loss or gradient are not finite; then nothing changes.

        Args:
            lr: Learning rate; groups of parameters with an `lr_scale` use their share of it.
            loss: Mean loss of the update over all ranks.
        """
        for group in self.optimizer.param_groups:
            group["lr"] = lr * group.get("lr_scale", 1.0)
        step = take_step(self.network, self.optimizer, self.scaler, self.recipe, loss=loss)
        if step.fault is not None:
            self.statistics.undo()
        elif self.ema is not None:
            self.ema.update(self.model)
        return step


@contextmanager
def open_student(
    model: nn.Module,
    processor: BaseImageProcessor,
    recipe: FinetuneRecipe,
    accelerator: Accelerator,
    *,
    num_classes: int,
    is_multi_label: bool = False,
    ema: ModelEmaV3 | None = None,
    open_teacher: Callable[[], TeacherOutputs] | None = None,
) -> Iterator[Student]:
    """Prepare `model` for training inside the block, in place; dropout, memory format and hooks are undone after it.

    Args:
        model: On the accelerator's device; not wrapped.
        processor: The image processor of the model.
        recipe: How to train.
        accelerator: The ranks. Random numbers of its device are restored after the block.
        num_classes: Number of classes.
        is_multi_label: Each image has a list of classes.
        ema: Moving average of the weights of `model`.
        open_teacher: Opens the teacher, after everything that the model may not support was checked.

    Raises:
        RecipeError: The model does not support a setting of the recipe.
    """
    device = accelerator.device
    with (
        torch.random.fork_rng(devices=[device] if device.type == "cuda" else []),
        regularised(model, recipe),
        distillation_heads(model, recipe, has_teacher=open_teacher is not None) as heads,
        accelerated(model, recipe) as compiled,
    ):
        network = compiled
        if accelerator.num_processes > 1:
            with frozen_unreached(model, processor):
                network = _wrapped(compiled, accelerator)
        teacher = None if open_teacher is None else open_teacher()
        taught_alone = None if not isinstance(model, HeldModel) or reads_labels(model) else model.objective.distances
        yield Student(
            model=model,
            network=network,
            ema=ema,
            part_loss=PartLoss(
                network, processor, recipe, device, num_classes, is_multi_label, heads, teacher, taught_alone
            ),
            optimizer=build_optimizer(model, recipe),
            scaler=torch.amp.GradScaler(device.type, enabled=recipe.precision == "fp16"),
            statistics=AveragedStatistics(model, accelerator),
            recipe=recipe,
            accelerator=accelerator,
        )


def _wrapped(network: nn.Module, accelerator: Accelerator) -> nn.Module:
    """Wrap the network for several ranks, which wait for the gradients of all parameters that are not frozen.

    `Accelerator.prepare` would leave a patched, autocasting forward on the caller's model. Buffers are not broadcast
    from the first rank: `AveragedStatistics` averages them over the parts of a batch.
    """
    device_ids = [accelerator.device] if accelerator.device.type == "cuda" else None
    return DistributedDataParallel(network, device_ids=device_ids, broadcast_buffers=False)
