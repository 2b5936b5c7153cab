"""Training: the same updates for any split of the batch into ranks and accumulation steps."""

import math
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.logging import get_logger
from accelerate.utils import broadcast
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm
from transformers import BaseImageProcessor

from isoprune_hf.errors import DatasetError, RecipeError
from isoprune_hf.recipes import FinetuneRecipe
from isoprune_hf.training.augmentation import seed_from, train_transform
from isoprune_hf.training.data import ImageData
from isoprune_hf.training.distillation import training_loss
from isoprune_hf.training.evaluation import evaluate_model
from isoprune_hf.training.loading import train_batches

logger = get_logger(__name__)


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

    All ranks call this with equal weights and end with equal weights. The batch is split over ranks and accumulation
    steps into equal micro-batches whose losses are summed, so the split changes nothing (but BatchNorm and dropout,
    which see micro-batches).

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
        save: Called on all ranks with "last" after each epoch and with "best" when top-1 is the best of the trained
            epochs, then the model and the epoch's entry of the history.

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
    # Not `prepare`: it would leave a patched, autocasting forward on the caller's model.
    device_ids = [device] if device.type == "cuda" else None
    network = DistributedDataParallel(model, device_ids=device_ids) if world > 1 else model
    optimizer = build_optimizer(model, recipe)
    history: list[dict[str, Any]] = []
    best_epoch, best_top1 = 0, -1.0

    def evaluation() -> dict[str, Any]:
        if data.evaluation is None:
            return {}
        options = {"accelerator": accelerator, "batch_size": eval_batch_size, "num_workers": num_workers}
        return evaluate_model(model, data.evaluation, processor, **options)

    if data.evaluation is not None:
        history.append({"epoch": 0, **evaluation()})
        logger.info(_describe(history[-1]))
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        for epoch in range(1, recipe.epochs + 1):
            torch.manual_seed(seed_from(recipe.seed, epoch, rank))
            batches = train_batches(
                data.train,
                transform,
                batch_size=batch_size,
                micro_batch_size=batch_size // (world * recipe.grad_accumulation),
                seed=recipe.seed,
                epoch=epoch,
                num_workers=num_workers,
                rank=rank,
                world=world,
            )
            entry = _train_epoch(
                network,
                batches,
                recipe,
                epoch=epoch,
                optimizer=optimizer,
                accelerator=accelerator,
                teacher=teacher,
                batch_size=batch_size,
            )
            # Running statistics of BatchNorm are each rank's own until now; what is evaluated is what is saved.
            for buffer in model.buffers():
                broadcast(buffer)
            due = epoch % recipe.evaluate_every == 0 or epoch == recipe.epochs
            entry |= evaluation() if due else {}
            history.append(entry)
            logger.info(_describe(entry))
            if save is not None:
                save("last", model, entry)
            if data.evaluation is None:
                best_epoch = epoch
            elif due and entry["top1"] > best_top1:
                best_epoch, best_top1 = epoch, entry["top1"]
                if save is not None:
                    save("best", model, entry)
    optimizer.zero_grad()
    model.eval()
    return {"history": history, "best_epoch": best_epoch}


def _train_epoch(
    network: nn.Module,
    batches: torch.utils.data.DataLoader,
    recipe: FinetuneRecipe,
    *,
    epoch: int,
    optimizer: torch.optim.Optimizer,
    accelerator: Accelerator,
    teacher: nn.Module | None,
    batch_size: int,
) -> dict[str, Any]:
    """Train `network` in place for one epoch; return its entry of the history."""
    network.train()
    updates = len(batches) // recipe.grad_accumulation
    stream, losses, start = iter(batches), 0.0, time.perf_counter()
    hidden = not (sys.stderr.isatty() and accelerator.is_main_process)
    for update in tqdm(range(updates), desc=f"epoch {epoch}", unit="update", leave=False, disable=hidden):
        lr = learning_rate_at((epoch - 1) * updates + update, recipe=recipe, updates_per_epoch=updates)
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.zero_grad()
        total = torch.zeros((), device=accelerator.device)
        for step in range(recipe.grad_accumulation):
            _, pixel_values, labels = next(stream)
            last = step == recipe.grad_accumulation - 1
            with nullcontext() if last else accelerator.no_sync(network):
                loss = _micro_batch_loss(network, teacher, pixel_values, labels, recipe, accelerator.device)
                # The ranks' gradients are averaged, so `world` times a share of the global mean gives the mean.
                (loss * (accelerator.num_processes / batch_size)).backward()
            total += loss.detach()
        # Over all ranks, so that all raise, and before the step, so that the weights stay finite.
        mean = accelerator.reduce(total, reduction="sum").item() / batch_size
        if not math.isfinite(mean):
            raise RecipeError(
                f"finetune: the loss is {mean} at update {update} of epoch {epoch}; lower finetune.learning_rate (now "
                f"{recipe.learning_rate}), set finetune.clip_grad (now {recipe.clip_grad}) or "
                f"finetune.precision: no (now {recipe.precision})"
            )
        losses += mean
        if recipe.clip_grad is not None:
            nn.utils.clip_grad_norm_(network.parameters(), recipe.clip_grad)
        optimizer.step()
    seconds = time.perf_counter() - start
    speed = updates * batch_size / seconds
    return {"epoch": epoch, "train_loss": losses / updates, "lr": lr, "images_per_second": speed}


def _micro_batch_loss(
    network: nn.Module,
    teacher: nn.Module | None,
    pixel_values: Tensor,
    labels: Tensor,
    recipe: FinetuneRecipe,
    device: torch.device,
) -> Tensor:
    """Return the sum of the samples' losses."""
    pixel_values, labels = pixel_values.to(device, non_blocking=True), labels.to(device, non_blocking=True)
    with torch.autocast(device.type, torch.bfloat16, enabled=recipe.precision == "bf16"):
        logits = network(pixel_values=pixel_values).logits
        teacher_logits = None
        if teacher is not None and recipe.distillation != "none":
            with torch.no_grad():
                teacher_logits = teacher(pixel_values=pixel_values).logits
    return training_loss(
        logits,
        labels,
        teacher_logits,
        label_smoothing=recipe.label_smoothing,
        distillation=recipe.distillation,
        weight=recipe.distillation_weight,
        temperature=recipe.temperature,
    ).sum()


def fit_batch_size(images: int, recipe: FinetuneRecipe, *, world: int) -> int:
    """Return the images of an update: the recipe's number, or the largest legal one that a small split has.

    Raises:
        RecipeError: The number is no multiple of ranks times accumulation steps.
        DatasetError: The split is smaller than one image for each of them.
    """
    parts = world * recipe.grad_accumulation
    if recipe.batch_size % parts:
        below = recipe.batch_size // parts * parts
        legal = " or ".join(str(size) for size in (below, below + parts) if size)
        raise RecipeError(
            "finetune.batch_size must be a multiple of ranks x grad_accumulation = "
            f"{world} x {recipe.grad_accumulation}, got {recipe.batch_size}; give {legal}"
        )
    if images >= recipe.batch_size:
        return recipe.batch_size
    if images < parts:
        raise DatasetError(
            f"finetune: {images} training images are fewer than ranks x grad_accumulation = "
            f"{world} x {recipe.grad_accumulation}; lower finetune.grad_accumulation or start fewer ranks"
        )
    fitted = images // parts * parts
    logger.warning(
        f"finetune.batch_size {recipe.batch_size} is more than the {images} training images, using {fitted}"
    )
    return fitted


def build_optimizer(model: nn.Module, recipe: FinetuneRecipe) -> torch.optim.Optimizer:
    """Build the optimizer over the trainable parameters; those with fewer than two dims do not decay."""
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [
        {"params": [parameter for parameter in trainable if parameter.ndim >= 2], "weight_decay": recipe.weight_decay},
        {"params": [parameter for parameter in trainable if parameter.ndim < 2], "weight_decay": 0.0},
    ]
    if recipe.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=recipe.learning_rate, momentum=recipe.momentum)
    return torch.optim.AdamW(groups, lr=recipe.learning_rate)


def learning_rate_at(update: int, *, recipe: FinetuneRecipe, updates_per_epoch: int) -> float:
    """Return the learning rate of an update, counted from 0 over all epochs.

    Linear warm-up reaches the peak with its last update; cosine then falls to `min_learning_rate` at the end of the
    last epoch.
    """
    warmup = recipe.warmup_epochs * updates_per_epoch
    if update < warmup:
        return recipe.learning_rate * min(1.0, (update + 1) / warmup)
    if recipe.schedule == "step":
        return recipe.learning_rate * recipe.step_gamma ** (update // updates_per_epoch // recipe.step_epochs)
    progress = (update - warmup) / (recipe.epochs * updates_per_epoch - warmup)
    span = recipe.learning_rate - recipe.min_learning_rate
    return recipe.min_learning_rate + span * (1 + math.cos(math.pi * progress)) / 2


def _describe(entry: dict[str, Any]) -> str:
    numbers = [f"{name} {value:.4g}" for name, value in entry.items() if name != "epoch"]
    return f"epoch {entry['epoch']}: " + ", ".join(numbers)
