"""Training: the same updates for any split of the batch into ranks and accumulation steps."""

import math
import sys
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.logging import get_logger
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm
from transformers import BaseImageProcessor

from isoprune_hf.errors import DatasetError, RecipeError
from isoprune_hf.recipes import FinetuneRecipe
from isoprune_hf.training.augmentation import seed_from, train_transform
from isoprune_hf.training.data import ImageData
from isoprune_hf.training.distillation import training_loss, two_heads
from isoprune_hf.training.evaluation import evaluate_model
from isoprune_hf.training.loading import TrainBatches, train_batches
from isoprune_hf.training.mixing import mix
from isoprune_hf.training.optimisation import build_optimizer, learning_rate_at
from isoprune_hf.training.regularisation import regularised
from isoprune_hf.training.replicas import AveragedStatistics, count_parts, fit_batch_size

logger = get_logger(__name__)

# Behind (seed, epoch, update, part): no stream of random numbers is that of an image, which has no fifth number.
_DROPPING, _MIXING = 1, 2
_PRECISIONS = {"bf16": torch.bfloat16, "fp16": torch.float16}


def finetune(
    model: nn.Module,
    data: ImageData,
    processor: BaseImageProcessor,
    recipe: FinetuneRecipe,
    *,
    accelerator: Accelerator,
    teacher: nn.Module | None = None,
    eval_batch_size: int = 64,
    num_workers: int = 0,
    save: Callable[[str, nn.Module, dict[str, Any]], None] | None = None,
) -> dict[str, Any]:
    """Train `model` in place, on the accelerator's device; it ends in eval mode and without gradients.

    All ranks call this with equal weights and end with equal weights. A batch has parts (`virtual_replicas`), which
    the ranks take in turn; their losses are summed. BatchNorm, mixup and dropout see one part, with random numbers
    that depend on seed, epoch, update and part alone, so the number of ranks changes nothing.

    Args:
        model: Gives `.logits` of shape (B, C) for `pixel_values`; not wrapped.
        data: Trains on its `train` split; its `evaluation` split, if there, is evaluated before the first epoch and
            every `recipe.evaluate_every`-th and the last.
        processor: Makes the pixel values; the training transform takes size and normalisation from it.
        recipe: How to train.
        accelerator: The ranks; precision and accumulation are the recipe's, not the accelerator's.
        teacher: Gives logits of the same classes; moved to the device, frozen and put in eval mode.
        eval_batch_size: Images in an evaluation batch on each rank.
        num_workers: Loader processes on each rank.
        save: Called on all ranks with a name, the model and the epoch's entry of the history: "last" after each epoch
            (and "ema", with the averaged weights), "best" when top-1 is the best of the trained epochs, "epoch-010"
            and so on for `save_every`. The best, and what `model` ends as, are of the kind that `recipe.best` says.

    Returns:
        `history`: for each epoch `epoch`, `train_loss`, `lr` (of the last update), `images_per_second` and what
        `evaluate_model` returns; epoch 0, before training, has the evaluation alone. `best_epoch`: the trained epoch
        with the best top-1, or the last one without an evaluation split.

    Raises:
        RecipeError: The batch cannot be split equally, or the loss is not finite.
        DatasetError: There are fewer images than micro-batches in an update.
    """
    if data.train is None:
        raise DatasetError(f"finetune: {data.name!r} has no training split; set data.train_split")
    device, rank, world = accelerator.device, accelerator.process_index, accelerator.num_processes
    batch_size = fit_batch_size(len(data.train), recipe, world=world)
    transform = train_transform(processor, recipe)
    model.to(device)
    if teacher is not None:
        teacher.to(device).eval().requires_grad_(False)
    ema = None if recipe.ema_decay is None else ModelEmaV3(model, decay=recipe.ema_decay)
    result = ema.module if recipe.best == "ema" else model
    history: list[dict[str, Any]] = []
    best_epoch, best_top1 = 0, -1.0

    def evaluation() -> dict[str, Any]:
        if data.evaluation is None:
            return {}
        options = {"accelerator": accelerator, "batch_size": eval_batch_size, "num_workers": num_workers}
        figures = evaluate_model(result, data.evaluation, processor, **options)
        if ema is not None:
            kind, other = ("raw", model) if recipe.best == "ema" else ("ema", ema.module)
            others = evaluate_model(other, data.evaluation, processor, **options)
            figures |= {f"{kind}_{name}": others[name] for name in ("top1", "loss")}
        return figures

    if data.evaluation is not None:
        history.append({"epoch": 0, **evaluation()})
        logger.info(_describe(history[-1]))
    generators = torch.random.fork_rng(devices=[device] if device.type == "cuda" else [])
    with generators, regularised(model, recipe), _heads(model, teacher, recipe) as heads:
        training = _Training(
            model=model,
            # Not `prepare`: it would leave a patched, autocasting forward on the caller's model. Buffers are averaged
            # over the parts of a batch, not taken from the first rank.
            network=DistributedDataParallel(
                model, device_ids=[device] if device.type == "cuda" else None, broadcast_buffers=False
            )
            if world > 1
            else model,
            num_classes=len(data.label_names),
            recipe=recipe,
            accelerator=accelerator,
            teacher=teacher if recipe.distillation != "none" else None,
            heads=heads,
            optimizer=build_optimizer(model, recipe),
            scaler=torch.amp.GradScaler(device.type, enabled=recipe.precision == "fp16"),
            ema=ema,
            statistics=AveragedStatistics(model, accelerator),
        )
        for epoch in range(1, recipe.epochs + 1):
            batches = train_batches(
                data.train,
                transform,
                batch_size=batch_size,
                parts=count_parts(recipe, world=world),
                seed=recipe.seed,
                epoch=epoch,
                num_workers=num_workers,
                rank=rank,
                world=world,
                repeats=recipe.repeated_augmentation,
                drop_last=recipe.drop_last,
            )
            entry = _train_epoch(training, batches, epoch)
            due = epoch % recipe.evaluate_every == 0 or epoch == recipe.epochs
            entry |= evaluation() if due else {}
            history.append(entry)
            logger.info(_describe(entry))
            is_best = data.evaluation is None or (due and entry["top1"] > best_top1)
            if is_best:
                best_epoch, best_top1 = epoch, entry.get("top1", -1.0)
            for name, kept in _checkpoints(model, ema, result, recipe, epoch, is_best and data.evaluation is not None):
                if save is not None:
                    save(name, kept, entry)
    training.optimizer.zero_grad()
    if result is not model:
        model.load_state_dict(result.state_dict())
    model.eval()
    return {"history": history, "best_epoch": best_epoch}


def _checkpoints(
    model: nn.Module, ema: ModelEmaV3 | None, result: nn.Module, recipe: FinetuneRecipe, epoch: int, is_best: bool
) -> list[tuple[str, nn.Module]]:
    """What is saved after an epoch: names and models."""
    saved = [("last", model)]
    if ema is not None:
        saved.append(("ema", ema.module))
    if recipe.save_every is not None and epoch % recipe.save_every == 0:
        saved.append((f"epoch-{epoch:03d}", result))
    return [*saved, *[("best", result)] * is_best]


def _heads(
    model: nn.Module, teacher: nn.Module | None, recipe: FinetuneRecipe
) -> AbstractContextManager[Callable[[], tuple[Tensor, Tensor]] | None]:
    if recipe.distillation_head == "logits":
        return nullcontext()
    if teacher is None or recipe.distillation == "none":
        raise RecipeError("finetune.distillation_head token needs a teacher: set finetune.teacher, or logits")
    return two_heads(model)


@dataclass(frozen=True, eq=False)
class _Training:
    """What stays the same over all epochs.

    Args:
        network: `model`, wrapped where there are several ranks.
        num_classes: Of the classifier.
        heads: Gives the logits of both heads of the last forward pass, where the teacher speaks to one of them.
    """

    model: nn.Module
    network: nn.Module
    num_classes: int
    recipe: FinetuneRecipe
    accelerator: Accelerator
    teacher: nn.Module | None
    heads: Callable[[], tuple[Tensor, Tensor]] | None
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    ema: ModelEmaV3 | None
    statistics: AveragedStatistics


def _train_epoch(training: _Training, batches: TrainBatches, epoch: int) -> dict[str, Any]:
    """Train for one epoch, in place; return its entry of the history."""
    recipe, accelerator = training.recipe, training.accelerator
    rank, world = accelerator.process_index, accelerator.num_processes
    training.network.train()
    updates = len(batches.totals)
    parts = len(batches.sizes) // updates
    stream, losses, start = iter(batches.loader), 0.0, time.perf_counter()
    hidden = not (sys.stderr.isatty() and accelerator.is_main_process)
    for update in tqdm(range(updates), desc=f"epoch {epoch}", unit="update", leave=False, disable=hidden):
        lr = learning_rate_at((epoch - 1) * updates + update, recipe=recipe, updates_per_epoch=updates)
        for group in training.optimizer.param_groups:
            group["lr"] = lr
        training.optimizer.zero_grad()
        training.statistics.begin()
        samples = batches.totals[update]
        total = torch.zeros((), device=accelerator.device)
        for step in range(parts):
            _, pixel_values, labels = next(stream)
            size = batches.sizes[update * parts + step]
            with nullcontext() if step == parts - 1 else accelerator.no_sync(training.network):
                seeds = (recipe.seed, epoch, update, rank + step * world)
                loss = _part_loss(training, pixel_values, labels, seeds) * bool(size)
                # The ranks' gradients are averaged, so `world` times a share of the global mean gives the mean.
                training.scaler.scale(loss * (world / samples)).backward()
            training.statistics.add(counts=bool(size))
            total += loss.detach()
        training.statistics.end()
        # Over all ranks, so that all raise, and before the step, so that the weights stay finite.
        mean = accelerator.reduce(total, reduction="sum").item() / samples
        if not math.isfinite(mean):
            raise RecipeError(
                f"finetune: the loss is {mean} at update {update} of epoch {epoch}; lower finetune.learning_rate (now "
                f"{recipe.learning_rate}), set finetune.clip_grad (now {recipe.clip_grad}) or "
                f"finetune.precision: no (now {recipe.precision})"
            )
        losses += mean * samples
        training.scaler.unscale_(training.optimizer)
        if recipe.clip_grad is not None:
            nn.utils.clip_grad_norm_(training.network.parameters(), recipe.clip_grad)
        scale = training.scaler.get_scale()
        training.scaler.step(training.optimizer)
        training.scaler.update()
        if training.ema is not None and training.scaler.get_scale() >= scale:  # the scale falls where no step was made
            training.ema.update(training.model)
    seconds, seen = time.perf_counter() - start, sum(batches.totals)
    return {"epoch": epoch, "train_loss": losses / seen, "lr": lr, "images_per_second": seen / seconds}


def _part_loss(training: _Training, pixel_values: Tensor, labels: Tensor, seeds: tuple[int, ...]) -> Tensor:
    """Return the sum of the samples' losses of a part of a batch."""
    recipe, device = training.recipe, training.accelerator.device
    torch.manual_seed(seed_from(*seeds, _DROPPING))
    pixel_values, labels = pixel_values.to(device, non_blocking=True), labels.to(device, non_blocking=True)
    pixel_values, labels = mix(pixel_values, labels, recipe, num_classes=training.num_classes, seeds=(*seeds, _MIXING))
    with torch.autocast(device.type, _PRECISIONS.get(recipe.precision), enabled=recipe.precision in _PRECISIONS):
        logits, taught_logits = training.network(pixel_values=pixel_values).logits, None
        if training.heads is not None:
            logits, taught_logits = training.heads()
        teacher_logits = None
        if training.teacher is not None:
            with torch.no_grad():
                teacher_logits = training.teacher(pixel_values=pixel_values).logits
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


def _describe(entry: dict[str, Any]) -> str:
    numbers = [f"{name} {value:.4g}" for name, value in entry.items() if name != "epoch"]
    return f"epoch {entry['epoch']}: " + ", ".join(numbers)
