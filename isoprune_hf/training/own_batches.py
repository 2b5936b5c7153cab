"""Train any module on batches that the caller makes: `train_on_batches`. Images of a data set: `finetune`."""

import time
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import islice
from typing import NamedTuple

import torch
from accelerate import Accelerator
from accelerate.logging import get_logger
from timm.utils.model_ema import ModelEmaV3
from torch import Tensor, nn

from isoprune_hf.errors import RecipeError
from isoprune_hf.models.calling import CallForm, input_dtype
from isoprune_hf.models.objective import Objective, as_classes, chooses_class
from isoprune_hf.recipes import FinetuneRecipe
from isoprune_hf.training.acceleration import accelerated, autocast
from isoprune_hf.training.distillation import training_loss
from isoprune_hf.training.log import describe_epoch
from isoprune_hf.training.optimisation import build_optimizer, learning_rate_at
from isoprune_hf.training.optimizer_step import check_faults, take_step
from isoprune_hf.training.progress import Entry
from isoprune_hf.training.regularisation import regularised
from isoprune_hf.training.replicas import AveragedStatistics
from isoprune_hf.training.stored_precision import StoredPrecision

logger = get_logger(__name__)

# Settings of images, of several ranks and of the runs of the command line.
_OF_IMAGES = (
    *("grad_accumulation", "virtual_replicas", "repeated_augmentation", "mixup", "cutmix", "distillation_head"),
    *("teacher_cache", "teacher_precision", "channels_last", "crop_scale", "interpolation", "hflip", "auto_augment"),
    *("random_erasing", "save_every", "state_every", "max_minutes", "tracker", "peak_tflops"),
)


class OwnBatch(NamedTuple):
    """A batch of a caller.

    Args:
        inputs: What the module takes, each (B, ...).
        targets: What its outputs are compared with, (B, ...); None without a loss of targets.
    """

    inputs: tuple[Tensor, ...]
    targets: Tensor | None


@dataclass(frozen=True, eq=False)
class OwnLoss:
    """The loss of a batch.

    Args:
        objective: The loss of the targets, and the outputs by which two models are compared.
        form: Inputs of the module, and of the teacher, and the outputs that count.
        recipe: How much of the loss is the teacher's.
        teacher: A module with the outputs of the one that is trained, which is moved and becomes float32; None without
            a teacher.
    """

    objective: Objective
    form: CallForm
    recipe: FinetuneRecipe
    teacher: nn.Module | None

    def __call__(self, module: nn.Module, batch: OwnBatch) -> Tensor:
        """Return the loss of each sample, (B,), or summed over the samples, a scalar.

        Source:
            For classes see `training_loss`, for other outputs `Objective.distances`.
        """
        recipe, objective = self.recipe, self.objective
        outputs = self.form.tensors(self.form.call(module, batch.inputs))
        wanted = None
        if self.teacher is not None:
            with torch.no_grad():
                wanted = self.form.tensors(self.form.call(self.teacher, batch.inputs))
        if chooses_class(objective) and batch.targets is not None:
            return training_loss(
                objective.logits(outputs),
                as_classes(batch.targets),
                None if wanted is None else objective.logits(wanted),
                label_smoothing=recipe.label_smoothing,
                distillation=recipe.distillation,
                weight=recipe.distillation_weight,
                temperature=recipe.temperature,
                teacher_label_smoothing=recipe.teacher_label_smoothing,
            )
        weight = 0.0 if wanted is None else 1.0 if batch.targets is None else recipe.distillation_weight
        loss = outputs[0].new_zeros(())
        if batch.targets is not None:
            loss = objective.summed_loss(outputs, batch.targets, self.form.pack(batch.inputs))
        taught = outputs[0].new_zeros(()) if wanted is None else objective.distances(outputs, wanted).sum()
        return (1 - weight) * loss + weight * taught


def check_own_recipe(recipe: FinetuneRecipe, *, has_classes: bool) -> None:
    """Check that a recipe has no setting that needs images.

    Raises:
        RecipeError: It has one, or hard distillation where there are no classes.
    """
    plain = FinetuneRecipe()
    for name in _OF_IMAGES:
        if getattr(recipe, name) != getattr(plain, name):
            raise RecipeError(
                f"finetune.{name} {getattr(recipe, name)} is for images of a data set, not for batches of your own: "
                "leave it out, or apply it in your loader"
            )
    if recipe.distillation == "hard" and not has_classes:
        raise RecipeError("finetune.distillation hard needs outputs that are classes; set it to soft or none")


def train_on_batches(
    module: nn.Module,
    batches: Iterable[OwnBatch],
    loss: OwnLoss,
    accelerator: Accelerator,
    *,
    updates: int,
) -> list[Entry]:
    """Train a module in place, on the accelerator's device, and leave it in eval mode and without gradients.

    Args:
        module: The module.
        batches: The batches of an epoch, in a new pass for each; one optimizer step each.
        loss: The loss of a batch, whose recipe says how to train.
        accelerator: Names the device; one process.
        updates: Number of batches of an epoch.

    Returns:
        For each epoch `epoch`, `train_loss`, `lr` and `samples_per_second`.

    Raises:
        DivergedError: The loss or the gradient is not finite.
        RecipeError: The module does not support a setting.
    """
    recipe, device = loss.recipe, accelerator.device
    module.to(device)
    if loss.teacher is not None:
        loss.teacher.to(device).float().eval()
    precision = StoredPrecision(module)
    history: list[Entry] = []
    with regularised(module, recipe), accelerated(module, recipe) as network:
        update = _Update(module, network, loss, accelerator)
        for epoch in range(1, recipe.epochs + 1):
            network.train()
            entry = _run_epoch(update, batches, epoch, updates)
            history.append(entry)
            logger.info(describe_epoch(entry))
    update.optimizer.zero_grad()
    if update.ema is not None and recipe.best == "ema":
        module.load_state_dict(update.ema.module.state_dict())
    precision.restore(module)
    module.eval()
    return history


class _Update:
    """An optimizer step on one batch, with what it changes: optimizer, loss scale and moving average."""

    def __init__(self, module: nn.Module, network: nn.Module, loss: OwnLoss, accelerator: Accelerator):
        recipe, self.device = loss.recipe, accelerator.device
        self.recipe = recipe
        self.network = network
        self.optimizer = build_optimizer(module, recipe)
        self.ema = None if recipe.ema_decay is None else ModelEmaV3(module, decay=recipe.ema_decay)
        self._module = module
        self._loss = loss
        self._scaler = torch.amp.GradScaler(self.device.type, enabled=recipe.precision == "fp16")
        self._statistics = AveragedStatistics(module, accelerator)
        self._dtype = input_dtype(module)

    def __call__(self, batch: OwnBatch, *, lr: float) -> tuple[float, str | None]:
        """Make the step; return the mean loss, and why the step was skipped."""
        samples = len(batch.inputs[0])
        inputs = tuple(value.to(self.device, self._dtype) for value in batch.inputs)
        placed = OwnBatch(inputs, None if batch.targets is None else batch.targets.to(self.device))
        self.optimizer.zero_grad()
        for group in self.optimizer.param_groups:
            group["lr"] = lr * group.get("lr_scale", 1.0)
        self._statistics.begin()
        with autocast(self.device, self.recipe):
            loss = self._loss(self.network, placed).sum() / samples
        self._scaler.scale(loss).backward()  # type: ignore[no-untyped-call]  # untyped in torch
        mean = float(loss.detach())
        fault = take_step(self.network, self.optimizer, self._scaler, self.recipe, loss=mean).fault
        if fault is not None:
            self._statistics.undo()
        elif self.ema is not None:
            self.ema.update(self._module)
        return mean, fault


def _run_epoch(update: _Update, batches: Iterable[OwnBatch], epoch: int, updates: int) -> Entry:
    """Train on the batches of an epoch and return its entry."""
    recipe = update.recipe
    start, losses, samples, skipped = time.perf_counter(), 0.0, 0, 0
    lr = recipe.learning_rate
    for number, batch in enumerate(islice(batches, updates)):
        lr = learning_rate_at((epoch - 1) * updates + number, recipe=recipe, updates_per_epoch=updates)
        loss, fault = update(batch, lr=lr)
        skipped = skipped + 1 if fault else 0
        if fault is not None:
            check_faults(fault, skipped, recipe, loss=loss, place=f"update {number} of epoch {epoch}")
            continue
        losses += loss * len(batch.inputs[0])
        samples += len(batch.inputs[0])
    seconds = max(time.perf_counter() - start, 1e-9)
    return {"epoch": epoch, "train_loss": losses / max(1, samples), "lr": lr, "samples_per_second": samples / seconds}
