"""The training loop: `Trainer.fit` runs the epochs, `epoch` the updates of one epoch, `update` one optimizer step.

The weights do not depend on how a batch is divided into ranks and accumulation steps: a batch has a fixed number of
parts, the random numbers of a part depend on (seed, epoch, update, part), and statistics are averaged over the parts.
The model with its optimizer is a `Student`. Log, snapshots, signals and checkpoints are callbacks; see `callbacks.py`.
"""

import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import partial

import torch
from accelerate import Accelerator
from accelerate.logging import get_logger
from accelerate.utils import gather_object
from timm.utils.model_ema import ModelEmaV3
from torch import nn
from transformers import BaseImageProcessor

from isoprune_hf.data.augmentation import train_transform
from isoprune_hf.data.dataset import ImageData
from isoprune_hf.data.decoding import Rows, check_broken
from isoprune_hf.data.epochs import EpochOrder, TrainBatches
from isoprune_hf.data.loading import ImageBatch, LoaderOptions, Ranks
from isoprune_hf.data.streaming import count_images, epoch_batches
from isoprune_hf.errors import DatasetError
from isoprune_hf.evaluation.predictions import Figures
from isoprune_hf.recipes import FinetuneRecipe
from isoprune_hf.terminal import with_bar
from isoprune_hf.training.acceleration import float64_device
from isoprune_hf.training.callbacks import Callback
from isoprune_hf.training.judging import CLASSES, Judging
from isoprune_hf.training.log import describe_epoch, describe_wait
from isoprune_hf.training.optimisation import learning_rate_at
from isoprune_hf.training.optimizer_step import check_faults
from isoprune_hf.training.progress import Entry, Progress, Update
from isoprune_hf.training.replicas import count_parts, fit_batch_size
from isoprune_hf.training.stored_precision import StoredPrecision
from isoprune_hf.training.student import Part, PartSums, Student, open_student
from isoprune_hf.training.teacher import TeacherModel, TeacherOutputs
from isoprune_hf.training.teacher_cache import open_teacher

logger = get_logger(__name__)

_DATA_WAIT_WARN_SHARE = 0.1  # of the time of an epoch
_COUNTS = ("images", "broken")  # figures that are the same for all weights


class Trainer:
    """Trains a model in place; see `finetune` for the arguments.

    All ranks make the same calls and end with the same weights.

    Args:
        options: How images are loaded; its batch size is for evaluation.
        callbacks: Called in this order.
    """

    student: Student  # set by `fit`

    def __init__(
        self,
        model: nn.Module,
        data: ImageData,
        processor: BaseImageProcessor,
        recipe: FinetuneRecipe,
        *,
        accelerator: Accelerator,
        options: LoaderOptions,
        teacher: TeacherModel | None = None,
        judging: Judging = CLASSES,
        callbacks: Sequence[Callback] = (),
    ):
        self.model = model.to(accelerator.device)
        self.precision = StoredPrecision(model)
        self.data, self.processor = data, processor
        self.recipe = recipe
        self.accelerator = accelerator
        self.options = options = options.for_processor(processor)
        self.callbacks, self.judging = callbacks, judging
        self.ranks = Ranks(accelerator.process_index, accelerator.num_processes)
        self.parts = count_parts(recipe, world=self.ranks.world)
        self.batch_size = recipe.batch_size  # `fit` lowers it for a small split
        self.updates_per_epoch = 0  # known from the first epoch on
        self.progress = Progress()
        self.ema = None if recipe.ema_decay is None else ModelEmaV3(model, decay=recipe.ema_decay)
        self._transform = train_transform(processor, recipe, decoding=options.decoding)
        self._is_loader_named = False  # as the bottleneck, once in a training
        self._open_teacher: Callable[[], TeacherOutputs] | None = None
        if teacher is not None and recipe.distillation != "none":
            self._open_teacher = partial(
                open_teacher, teacher, data, self._transform, processor, recipe, accelerator, options
            )

    @property
    def result(self) -> nn.Module:
        """The model that is evaluated and kept: with `recipe.best` ema, the average of the weights."""
        return self.ema.module if self.ema is not None and self.recipe.best == "ema" else self.model

    def fit(self) -> list[Entry]:
        """Train from the restored snapshot, or from the beginning, to the last epoch; return the epochs' entries."""
        if self.data.train is None:
            raise DatasetError(f"finetune: {self.data.name!r} has no training split; set data.train_split")
        self.batch_size = fit_batch_size(count_images(self.data, self.recipe), self.recipe, world=self.ranks.world)
        with open_student(
            self.model,
            self.processor,
            self.recipe,
            self.accelerator,
            num_classes=len(self.data.label_names),
            is_multi_label=self.data.is_multi_label,
            ema=self.ema,
            open_teacher=self._open_teacher,
        ) as self.student:
            for callback in self.callbacks:
                callback.on_resume(self)
            for callback in self.callbacks:
                callback.on_fit_begin(self)
            self._run_epochs()
        self.student.optimizer.zero_grad()
        if self.result is not self.model:
            self.model.load_state_dict(self.result.state_dict())
        self.precision.restore(self.model)
        self.model.eval()
        return self.progress.history

    def _run_epochs(self) -> None:
        recipe, progress = self.recipe, self.progress
        if self.data.buffer is not None:
            logger.info(
                f"training on a stream: images are shuffled within {self.data.buffer}, an epoch may leave some out, "
                "and another number of ranks trains on other batches"
            )
        if self.data.evaluation is not None and not progress.history:
            self._record({"epoch": 0, **self.evaluate()})
        while progress.epoch <= recipe.epochs:
            entry = self._train_epoch()
            if entry is None:
                break
            is_evaluated = progress.epoch % recipe.evaluate_every == 0 or progress.epoch == recipe.epochs
            self._record(entry | (self.evaluate() if is_evaluated else {}))
            self.save(progress.history[-1])
            progress.start_next_epoch()

    def _train_epoch(self) -> Entry | None:
        """Load and train the rest of the current epoch within the callbacks; return None if a signal stopped it."""
        order = EpochOrder.of(self.recipe, epoch=self.progress.epoch, parts=self.parts)
        options = replace(self.options, batch_size=self.batch_size)
        batches = epoch_batches(self.data, self._transform, order, options, self.ranks, start=self.progress.update)
        self.updates_per_epoch = len(batches.totals)
        with ExitStack() as stack:
            for callback in self.callbacks:
                stack.enter_context(callback.during_epoch())
            entry = self.epoch(batches)
            for callback in self.callbacks:
                callback.on_updates_end(self, is_stopped=entry is None)
        return entry

    def epoch(self, batches: TrainBatches) -> Entry | None:
        """Run the remaining updates of the current epoch.

        Args:
            batches: The batches of the epoch, from the next update on.

        Returns:
            The epoch's entry for the history, or None if a signal stopped the epoch.

        Raises:
            DivergedError: The loss or the gradient is not finite, on all ranks alike.
            DatasetError: More images than the policy allows could not be read, on all ranks alike.
        """
        progress, updates = self.progress, len(batches.totals)
        self.student.network.train()
        stream = iter(batches.loader)
        for _ in with_bar(
            range(progress.update, updates),
            f"epoch {progress.epoch}",
            "update",
            rank=self.accelerator.process_index,
            initial=progress.update,
            total=updates,
        ):
            start = time.perf_counter()
            update = self.update(batches, stream)
            progress.seconds += time.perf_counter() - start
            self._count(update, batches)
            for callback in self.callbacks:
                callback.on_update_end(self, update, batches)
            if update.signal is not None:
                return None
        share = progress.waited / max(progress.seconds, 1e-9)
        if share > _DATA_WAIT_WARN_SHARE and not self._is_loader_named:
            self._is_loader_named = True
            decoder, workers = self.options.decoding.decoder, batches.loader.num_workers
            logger.info(describe_wait(progress.epoch, share, workers=workers, decoder=decoder))
        samples = sum(batches.totals)
        entry = {
            "epoch": progress.epoch,
            "train_loss": progress.losses / max(1, samples - progress.left_out),
            "lr": learning_rate_at(progress.epoch * updates - 1, recipe=self.recipe, updates_per_epoch=updates),
            "images_per_second": samples / max(progress.seconds, 1e-9),
        }
        return entry | ({"left_out": progress.left_out} if progress.left_out else {})

    def update(self, batches: TrainBatches, stream: Iterator[ImageBatch]) -> Update:
        """Make the next optimizer step from this rank's parts of the update."""
        epoch, number = self.progress.epoch, self.progress.update
        updates, samples = len(batches.totals), batches.totals[number]
        lr = learning_rate_at((epoch - 1) * updates + number, recipe=self.recipe, updates_per_epoch=updates)
        start = time.perf_counter()
        per_update = len(batches.sizes) // updates
        parts = [
            Part((self.recipe.seed, epoch, number, self.ranks.rank + part * self.ranks.world), size > 0)
            for part, size in enumerate(batches.sizes[number * per_update : (number + 1) * per_update])
        ]
        sums = self.student.add_gradients(stream, parts, samples=samples)
        # Reduced before the step: all ranks stop after the same update, and skip the step if one loss is not finite.
        loss_sum, stopped_by, are_broken = self._reduce(sums)
        loss = loss_sum / samples
        step = self.student.step(lr, loss=loss)
        seconds = time.perf_counter() - start
        figures = {
            **({"loss": loss, "grad_norm": step.norm} if step.fault is None else {"fault": step.fault}),
            "lr": lr,
            "images_per_second": samples / seconds,
            "data_wait": sums.waited / seconds,
        }
        broken = sorted(gather_object(sums.broken)) if are_broken else []
        return Update(loss, figures, stopped_by, broken, step.fault, sums.waited)

    def _reduce(self, sums: PartSums) -> tuple[float, signal.Signals | None, bool]:
        """Return, over all ranks: the sum of the losses, the signal to stop for, and whether images are unreadable."""
        signals = [callback.stop_signal() for callback in self.callbacks]
        received = next((number for number in signals if number is not None), None)
        is_interrupt = received == signal.SIGINT
        device = float64_device(sums.loss.device)
        flags = [received is not None and not is_interrupt, is_interrupt, len(sums.broken)]
        loss = sums.loss[None].to(device).double()
        totals = torch.cat([loss, torch.tensor(flags, dtype=torch.float64, device=device)])
        loss_sum, ended, interrupted, broken = self.accelerator.reduce(totals, reduction="sum").tolist()
        stopped_by = signal.SIGINT if interrupted else signal.SIGTERM if ended else None
        return loss_sum, stopped_by, bool(broken)

    def _count(self, update: Update, batches: TrainBatches) -> None:
        """Add a finished update to the progress, and check its faults and unreadable images."""
        progress = self.progress
        place = f"update {progress.update} of epoch {progress.epoch}"
        progress.add(update, samples=batches.totals[progress.update])
        if update.fault is not None:
            check_faults(update.fault, progress.faults, self.recipe, loss=update.loss, place=place)
        if update.broken:
            for position in update.broken:
                logger.warning(f"epoch {progress.epoch}: {batches.loader.images.describe(position)}")
            check_broken(progress.broken, self.data.decoding, f"epoch {progress.epoch}")

    def evaluate(self) -> Entry:
        """Evaluate the result on the evaluation split; with an average of the weights, also the other model."""
        if self.data.evaluation is None:
            return {}
        figures: Entry = dict(self._evaluate(self.result, self.data.evaluation))
        if self.ema is not None:
            name, other = ("ema", self.ema.module) if self.result is self.model else ("raw", self.model)
            others = self._evaluate(other, self.data.evaluation)
            figures |= {f"{name}_{key}": value for key, value in others.items() if key not in _COUNTS}
        return figures

    def _evaluate(self, model: nn.Module, split: Rows) -> Figures:
        stored = self.precision.stored(model)  # whose figures are recorded
        return self.judging.evaluate(stored, split, self.processor, self.options, accelerator=self.accelerator)

    def _record(self, entry: Entry) -> None:
        """Add an epoch's entry to the history and to the log."""
        self.progress.history.append(entry)
        logger.info(describe_epoch(entry))
        for callback in self.callbacks:
            callback.on_record(self, entry)

    def save(self, entry: Entry) -> None:
        """Update the best epoch, and pass the checkpoints of the current epoch to the callbacks."""
        progress, has_evaluation = self.progress, self.data.evaluation is not None
        figure = entry.get(self.judging.best, -1.0)
        is_best = not has_evaluation or figure > progress.best_top1
        if is_best:
            progress.best_epoch = progress.epoch
            progress.best_top1 = figure
        checkpoints = [("last", self.model)]
        if self.ema is not None:
            checkpoints.append(("ema", self.ema.module))
        if self.recipe.save_every is not None and progress.epoch % self.recipe.save_every == 0:
            checkpoints.append((f"epoch-{progress.epoch:03d}", self.result))
        if is_best and has_evaluation:
            checkpoints.append(("best", self.result))
        for name, model in checkpoints:
            for callback in self.callbacks:
                callback.on_checkpoint(name, self.precision.stored(model), entry)
