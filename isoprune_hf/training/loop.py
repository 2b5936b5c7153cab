"""Training: epochs, their evaluation, and what is saved of them."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.logging import get_logger
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from transformers import BaseImageProcessor

from isoprune_hf.data.augmentation import train_transform
from isoprune_hf.data.dataset import ImageData
from isoprune_hf.data.loading import TrainBatches
from isoprune_hf.data.streaming import count_images, epoch_batches
from isoprune_hf.errors import DatasetError, RecipeError
from isoprune_hf.evaluation.evaluate import evaluate_model
from isoprune_hf.recipes import FinetuneRecipe
from isoprune_hf.terminal import has_bars
from isoprune_hf.training.acceleration import Teacher, accelerated
from isoprune_hf.training.distillation import two_heads
from isoprune_hf.training.epoch import Progress, Training, Update, train_epoch
from isoprune_hf.training.log import Clock
from isoprune_hf.training.optimisation import build_optimizer
from isoprune_hf.training.regularisation import regularised
from isoprune_hf.training.replicas import AveragedStatistics, count_parts, fit_batch_size
from isoprune_hf.training.run import TrainingRun
from isoprune_hf.training.state import capture, restore
from isoprune_hf.training.teacher_cache import CachedTeacher

logger = get_logger(__name__)


def finetune(
    model: nn.Module,
    data: ImageData,
    processor: BaseImageProcessor,
    recipe: FinetuneRecipe,
    *,
    accelerator: Accelerator,
    teacher: nn.Module | None = None,
    teacher_processor: BaseImageProcessor | None = None,
    eval_batch_size: int = 64,
    num_workers: int = 0,
    save: Callable[[str, nn.Module, dict[str, Any]], None] | None = None,
    run: TrainingRun | None = None,
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
        teacher_processor: Where it normalises in another way than the student, so do its pixels.
        eval_batch_size: Images in an evaluation batch on each rank.
        num_workers: Loader processes on each rank.
        save: Called on all ranks with a name, the model and the epoch's entry of the history: "last" after each epoch
            (and "ema", with the averaged weights), "best" when top-1 is the best of the trained epochs, "epoch-010"
            and so on for `save_every`. The best, and what `model` ends as, are of the kind that `recipe.best` says.
        run: An open folder for snapshots and the log: what was begun in it goes on where it stands.

    Returns:
        `history`: for each epoch `epoch`, `train_loss`, `lr` (of the last update), `images_per_second` and what
        `evaluate_model` returns; epoch 0, before training, has the evaluation alone. `best_epoch`: the trained epoch
        with the best top-1, or the last one without an evaluation split.

    Raises:
        RecipeError: The batch cannot be split equally.
        DivergedError: The loss or the gradient is not finite.
        Interrupted: A signal has ended it; `run` holds a snapshot of the last update.
        DatasetError: There are fewer images than micro-batches in an update.
    """
    if data.train is None:
        raise DatasetError(f"finetune: {data.name!r} has no training split; set data.train_split")
    device, world = accelerator.device, accelerator.num_processes
    batch_size = fit_batch_size(count_images(data, recipe), recipe, world=world)
    transform = train_transform(processor, recipe, decoding=data.decoding)
    model.to(device)
    ema = None if recipe.ema_decay is None else ModelEmaV3(model, decay=recipe.ema_decay)
    result = ema.module if recipe.best == "ema" else model

    def evaluation() -> dict[str, Any]:
        if data.evaluation is None:
            return {}
        options = {"accelerator": accelerator, "batch_size": eval_batch_size, "num_workers": num_workers}
        options["decoding"] = data.decoding
        figures = evaluate_model(result, data.evaluation, processor, **options)
        if ema is not None:
            kind, other = ("raw", model) if recipe.best == "ema" else ("ema", ema.module)
            others = evaluate_model(other, data.evaluation, processor, **options)
            figures |= {f"{kind}_{name}": others[name] for name in ("top1", "top5", "loss", "ece")}
        return figures

    def teach() -> Teacher | CachedTeacher:
        if recipe.teacher_cache is None:
            processors = None if teacher_processor is None else (processor, teacher_processor)
            return Teacher(teacher, recipe, device=device, processors=processors)
        options = {"batch_size": eval_batch_size, "num_workers": num_workers, "teacher_processor": teacher_processor}
        return CachedTeacher(teacher, data, transform, processor, recipe, accelerator, **options)

    generators = torch.random.fork_rng(devices=[device] if device.type == "cuda" else [])
    with (
        generators,
        regularised(model, recipe),
        _heads(model, teacher, recipe) as heads,
        accelerated(model, recipe) as network,
    ):
        training = Training(
            model=model,
            processor=processor,
            # Not `prepare`: it would leave a patched, autocasting forward on the caller's model. Buffers are averaged
            # over the parts of a batch, not taken from the first rank.
            network=DistributedDataParallel(
                network, device_ids=[device] if device.type == "cuda" else None, broadcast_buffers=False
            )
            if world > 1
            else network,
            num_classes=len(data.label_names),
            recipe=recipe,
            accelerator=accelerator,
            teacher=None if teacher is None or recipe.distillation == "none" else teach(),
            heads=heads,
            optimizer=build_optimizer(model, recipe),
            scaler=torch.amp.GradScaler(device.type, enabled=recipe.precision == "fp16"),
            ema=ema,
            statistics=AveragedStatistics(model, accelerator),
            interrupted_by=lambda: None if run is None else run.interruption.signal,
        )
        split = {"batch_size": batch_size, "parts": count_parts(recipe, world=world)}
        progress = Progress() if run is None else _resume(training, run, split)
        if data.buffer is not None:
            logger.info(
                f"a stream promises less than a data set that lies here: images are shuffled within {data.buffer}, an "
                "epoch may leave some out, and another number of ranks trains on other batches"
            )
        if data.evaluation is not None and not progress.history:
            _note(progress, {"epoch": 0, **evaluation()}, run, accelerator, updates=0)
        for epoch in range(progress.epoch, recipe.epochs + 1):
            batches = epoch_batches(
                data,
                transform,
                recipe,
                **split,
                epoch=epoch,
                start=progress.update,
                num_workers=num_workers,
                rank=accelerator.process_index,
                world=world,
            )
            if run is None:
                entry = train_epoch(training, batches, progress, lambda update: True)
            else:
                entry = _train_in_run(training, batches, progress, run, split)
            due = epoch % recipe.evaluate_every == 0 or epoch == recipe.epochs
            entry |= evaluation() if due else {}
            _note(progress, entry, run, accelerator, updates=epoch * len(batches.totals))
            is_best = data.evaluation is None or (due and entry["top1"] > progress.best_top1)
            if is_best:
                progress.best_epoch, progress.best_top1 = epoch, entry.get("top1", -1.0)
            for name, kept in _checkpoints(model, ema, result, recipe, epoch, is_best and data.evaluation is not None):
                if save is not None:
                    save(name, kept, entry)
            progress.epoch, progress.update, progress.broken, progress.left_out = epoch + 1, 0, 0, 0
            progress.losses, progress.seconds, progress.waited = 0.0, 0.0, 0.0
    training.optimizer.zero_grad()
    if result is not model:
        model.load_state_dict(result.state_dict())
    model.eval()
    return {"history": progress.history, "best_epoch": progress.best_epoch}


def _resume(training: Training, run: TrainingRun, split: dict[str, int]) -> Progress:
    """Go on where the run stands, in place of `training`; at its beginning there is nothing to do."""
    snapshot, accelerator = run.read(), training.accelerator
    if accelerator.is_main_process:
        run.log.open(*((0, 0) if snapshot is None else (snapshot.epoch, snapshot.update)))
    if snapshot is None:
        return Progress()
    then, now = snapshot.values["split"], {**split, "ranks": accelerator.num_processes}
    if then["batch_size"] != now["batch_size"]:
        raise RecipeError(
            f"the run was begun with updates of {then['batch_size']} images, on {now['ranks']} ranks they have "
            f"{now['batch_size']}; start {then['ranks']} ranks"
        )
    progress = restore(training, snapshot)
    logger.info(f"continuing behind update {progress.update} of epoch {progress.epoch}")
    if then["ranks"] != now["ranks"]:
        parts = "" if then["parts"] == now["parts"] else ", and batches in other parts: set finetune.virtual_replicas"
        logger.warning(
            f"{now['ranks']} ranks continue what {then['ranks']} have begun: the same images in the same order, and "
            f"sums in another order{parts}"
        )
    return progress


def _train_in_run(
    training: Training, batches: TrainBatches, progress: Progress, run: TrainingRun, split: dict[str, int]
) -> dict[str, Any]:
    """Train an epoch to its end, with snapshots; a signal raises when the last of them is written."""
    accelerator, updates, clock = training.accelerator, len(batches.totals), Clock()
    is_main, done = accelerator.is_main_process, (progress.epoch - 1) * updates
    left = training.recipe.epochs * updates - done
    notes = {"split": {**split, "ranks": accelerator.num_processes}}

    def after(update: Update) -> bool:
        clock.count()
        if is_main and (progress.update % run.log_every == 0 or update.fault is not None):
            entry = {"epoch": progress.epoch, "update": progress.update, **update.figures}
            entry |= run.measure_compute(update.figures["images_per_second"])
            run.log.write(entry, step=done + progress.update)
            if update.fault is None and not has_bars():  # which has a bar instead
                logger.info(clock.describe(entry, left=left - progress.update))
        if is_main and update.broken:
            place = {"epoch": progress.epoch, "update": progress.update}
            names = [batches.loader.dataset.describe(position) for position in update.broken]
            run.log.write({**place, "broken": names}, step=done + progress.update)
        if update.signal is not None:
            run.interruption.signal = run.interruption.signal or update.signal
        elif is_main and progress.update < updates and run.is_due(progress.update):
            run.write(capture(training, progress, **notes))
        return update.signal is None

    with run.interruption.deferred():
        entry = train_epoch(training, batches, progress, after)
        run.interruption.where = (
            f"update {progress.update} of {updates} of epoch {progress.epoch} is saved; the same command continues"
        )
        if is_main:
            run.write(capture(training, progress, **notes), is_last=entry is None)
        if entry is None:
            accelerator.wait_for_everyone()  # the first rank to leave ends the others
    return entry


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


def _note(
    progress: Progress, entry: dict[str, Any], run: TrainingRun | None, accelerator: Accelerator, *, updates: int
) -> None:
    """Add the entry of an epoch to the history and to the log."""
    progress.history.append(entry)
    logger.info(_describe(entry))
    if run is not None and accelerator.is_main_process:
        run.log.write(entry, step=updates)
        run.log.write_table()


def _describe(entry: dict[str, Any]) -> str:
    numbers = [f"{name} {value:.4g}" for name, value in entry.items() if name != "epoch"]
    return f"epoch {entry['epoch']}: " + ", ".join(numbers)
