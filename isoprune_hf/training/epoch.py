"""One epoch: updates that are the same for any split of the batch into ranks and accumulation steps."""

import signal
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator
from accelerate.logging import get_logger
from accelerate.utils import gather_object
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from tqdm import tqdm
from transformers import BaseImageProcessor

from isoprune_hf.data.augmentation import seed_from
from isoprune_hf.data.decoding import check_broken
from isoprune_hf.data.loading import TrainBatches, broken_positions
from isoprune_hf.data.pixels import normalised
from isoprune_hf.recipes import FinetuneRecipe
from isoprune_hf.terminal import has_bars
from isoprune_hf.training.acceleration import PRECISIONS, arrange
from isoprune_hf.training.distillation import training_loss
from isoprune_hf.training.mixing import mix
from isoprune_hf.training.optimisation import learning_rate_at
from isoprune_hf.training.replicas import AveragedStatistics
from isoprune_hf.training.step import check_faults, take_step

logger = get_logger(__name__)

# Behind (seed, epoch, update, part): no stream of random numbers is that of an image, which has no fifth number.
_DROPPING, _MIXING = 1, 2
_MUCH_WAITING = 0.1  # of the time of an epoch


@dataclass(frozen=True, eq=False)
class Training:
    """What stays the same over all epochs.

    Args:
        processor: Normalises what the loader leaves as 8 bits.
        network: `model`, compiled where the recipe says so, and wrapped where there are several ranks.
        num_classes: Of the classifier.
        teacher: Gives logits for pixel values, and the positions of their images.
        heads: Gives the logits of both heads of the last forward pass, where the teacher speaks to one of them.
        interrupted_by: The signal that this rank was sent, if any.
    """

    model: nn.Module
    processor: BaseImageProcessor
    network: nn.Module
    num_classes: int
    recipe: FinetuneRecipe
    accelerator: Accelerator
    teacher: Callable[[Tensor, Tensor], Tensor] | None
    heads: Callable[[], tuple[Tensor, Tensor]] | None
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    ema: ModelEmaV3 | None
    statistics: AveragedStatistics
    interrupted_by: Callable[[], signal.Signals | None]


@dataclass
class Progress:
    """Where a training stands; moves on with it.

    Args:
        epoch: Counted from 1.
        update: Updates of the epoch that are done.
        losses: Sum of the losses of its samples.
        seconds: How long it took.
        waited: How much of it this process has waited for data.
        history: Entries of the epochs before it.
        broken: Images of the epoch that could not be read.
        left_out: Samples of the updates of the epoch that were left out, since they were not finite.
        faults: Such updates in a row.
        best_epoch: The one with the best top-1 so far.
        best_top1: Its top-1.
    """

    epoch: int = 1
    update: int = 0
    losses: float = 0.0
    seconds: float = 0.0
    waited: float = 0.0
    history: list[dict[str, Any]] = field(default_factory=list)
    best_epoch: int = 0
    best_top1: float = -1.0
    broken: int = 0
    left_out: int = 0
    faults: int = 0


class Update(NamedTuple):
    """An update that is done: its mean loss, what the log says of it, and the signal that all ranks stop for.

    `broken` has the positions of the images of all ranks that could not be read; `fault` says why the update was left
    out, if it was; `waited` has the seconds in which this rank waited for data.
    """

    loss: float
    figures: dict[str, float]
    signal: signal.Signals | None
    broken: list[int]
    fault: str | None = None
    waited: float = 0.0


def train_epoch(
    training: Training, batches: TrainBatches, progress: Progress, after: Callable[[Update], bool]
) -> dict[str, Any] | None:
    """Train from where `progress` stands to the end of the epoch, in place.

    Args:
        training: The models and what moves them.
        batches: Of this epoch, from the next update on.
        progress: Is moved on with each update.
        after: Called after each update; ends the epoch early by returning false.

    Returns:
        The epoch's entry of the history; None where it was ended early.

    Raises:
        DivergedError: The loss or the gradient is not finite, on all ranks alike.
        DatasetError: More images could not be read than the policy allows, on all ranks alike.
    """
    training.network.train()
    updates = len(batches.totals)
    stream = iter(batches.loader)
    hidden = not (has_bars() and training.accelerator.is_main_process)
    bar = {"desc": f"epoch {progress.epoch}", "unit": "update", "leave": False, "disable": hidden}
    for update in tqdm(range(progress.update, updates), initial=progress.update, total=updates, **bar):
        start = time.perf_counter()
        done = _update(training, batches, stream, progress.epoch, update)
        progress.update = update + 1
        progress.seconds += time.perf_counter() - start
        progress.waited += done.waited
        if done.fault is None:
            progress.losses += done.loss * batches.totals[update]
            progress.faults = 0
        else:
            progress.left_out += batches.totals[update]
            progress.faults += 1
            place = f"update {update} of epoch {progress.epoch}"
            check_faults(done.fault, progress.faults, training.recipe, loss=done.loss, place=place)
        if done.broken:
            progress.broken += len(done.broken)
            for position in done.broken:
                logger.warning(f"epoch {progress.epoch}: {batches.loader.dataset.describe(position)}")
            check_broken(progress.broken, batches.loader.dataset.decoding, f"epoch {progress.epoch}")
        if not after(done):
            return None
    share = progress.waited / max(progress.seconds, 1e-9)
    if share > _MUCH_WAITING:
        logger.info(
            f"epoch {progress.epoch}: the loader is the bottleneck, {share:.0%} of the time is waiting for data; "
            f"raise data.num_workers (now {batches.loader.num_workers}), or set data.decoder: torchvision"
        )
    seen = sum(batches.totals)
    lr = learning_rate_at(progress.epoch * updates - 1, recipe=training.recipe, updates_per_epoch=updates)
    speed = seen / max(progress.seconds, 1e-9)
    loss = progress.losses / max(1, seen - progress.left_out)
    entry = {"epoch": progress.epoch, "train_loss": loss, "lr": lr, "images_per_second": speed}
    return entry | ({"left_out": progress.left_out} if progress.left_out else {})


def _update(training: Training, batches: TrainBatches, stream: Iterator[Any], epoch: int, update: int) -> Update:
    recipe, accelerator, updates = training.recipe, training.accelerator, len(batches.totals)
    rank, world = accelerator.process_index, accelerator.num_processes
    lr = learning_rate_at((epoch - 1) * updates + update, recipe=recipe, updates_per_epoch=updates)
    for group in training.optimizer.param_groups:
        group["lr"] = lr * group.get("lr_scale", 1.0)
    training.optimizer.zero_grad()
    training.statistics.begin()
    start, waited = time.perf_counter(), 0.0
    samples, parts = batches.totals[update], len(batches.sizes) // updates
    total, broken = torch.zeros((), device=accelerator.device), []
    for step in range(parts):
        asked = time.perf_counter()
        positions, pixel_values, labels = next(stream)
        waited += time.perf_counter() - asked
        broken += broken_positions(positions)
        size = batches.sizes[update * parts + step]
        with nullcontext() if step == parts - 1 else accelerator.no_sync(training.network):
            seeds = (recipe.seed, epoch, update, rank + step * world)
            loss = _part_loss(training, positions, pixel_values, labels, seeds=seeds) * bool(size)
            # The ranks' gradients are averaged, so `world` times a share of the global mean gives the mean.
            training.statistics.add(counts=bool(size))
            training.scaler.scale(loss * (world / samples)).backward()
        training.statistics.undo()
        total += loss.detach()
    training.statistics.end()
    sent = training.interrupted_by()
    # Over all ranks, so that all stop after the same update, and before the step, so that the weights stay finite.
    flags = [sent is not None and sent != signal.SIGINT, sent == signal.SIGINT, len(broken)]
    sums = torch.cat([total[None].double(), torch.tensor(flags, dtype=torch.float64, device=total.device)])
    loss_sum, ended, cancelled, are_broken = accelerator.reduce(sums, reduction="sum").tolist()
    mean = loss_sum / samples
    step = take_step(
        training.network,
        training.optimizer,
        training.scaler,
        recipe,
        loss=mean,
        ema=training.ema,
        model=training.model,
    )
    if step.fault is not None:
        training.statistics.undo()
    seconds = time.perf_counter() - start
    figures = {
        **({"loss": mean, "grad_norm": step.norm} if step.fault is None else {"fault": step.fault}),
        "lr": lr,
        "images_per_second": samples / seconds,
        "data_wait": waited / seconds,
    }
    agreed = signal.SIGINT if cancelled else signal.SIGTERM if ended else None
    return Update(mean, figures, agreed, sorted(gather_object(broken)) if are_broken else [], step.fault, waited)


def _part_loss(
    training: Training, positions: Tensor, pixel_values: Tensor, labels: Tensor, *, seeds: tuple[int, ...]
) -> Tensor:
    """Return the sum of the samples' losses of a part of a batch."""
    recipe, device = training.recipe, training.accelerator.device
    torch.manual_seed(seed_from(*seeds, _DROPPING))
    pixel_values, labels = pixel_values.to(device, non_blocking=True), labels.to(device, non_blocking=True)
    pixel_values = normalised(pixel_values, training.processor)
    pixel_values, labels = mix(pixel_values, labels, recipe, num_classes=training.num_classes, seeds=(*seeds, _MIXING))
    pixel_values = arrange(pixel_values, recipe)
    with torch.autocast(device.type, PRECISIONS.get(recipe.precision), enabled=recipe.precision in PRECISIONS):
        logits, taught_logits = training.network(pixel_values=pixel_values).logits, None
        if training.heads is not None:
            logits, taught_logits = training.heads()
        teacher_logits = None if training.teacher is None else training.teacher(pixel_values, positions)
    return training_loss(
        logits,
        labels,
        teacher_logits,
        label_smoothing=recipe.label_smoothing,
        distillation=recipe.distillation,
        weight=recipe.distillation_weight,
        temperature=recipe.temperature,
        taught_logits=taught_logits,
        teacher_label_smoothing=recipe.teacher_label_smoothing,
    ).sum()
