"""Train a model by a recipe: call `finetune`."""

from typing import Any

from accelerate import Accelerator
from torch import nn
from transformers import BaseImageProcessor, PreTrainedModel

from isoprune_hf.data.dataset import ImageData
from isoprune_hf.data.labels import adopt_problem, check_problem, require_labels
from isoprune_hf.data.loading import LoaderOptions
from isoprune_hf.errors import RecipeError
from isoprune_hf.models.held import reads_labels
from isoprune_hf.recipes import FinetuneRecipe
from isoprune_hf.training.callbacks import (
    Callback,
    CheckpointCallback,
    LogCallback,
    SaveCheckpoint,
    SignalCallback,
    SnapshotCallback,
)
from isoprune_hf.training.judging import Judging, judging_of
from isoprune_hf.training.label_free import check_unlabelled
from isoprune_hf.training.run import TrainingRun
from isoprune_hf.training.teacher import TeacherModel, lent_teacher
from isoprune_hf.training.trainer import Trainer


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
    num_workers: int | None = 0,
    save: SaveCheckpoint | None = None,
    run: TrainingRun | None = None,
    judging: Judging | None = None,
) -> dict[str, Any]:
    """Train `model` in place, on the accelerator's device, and leave it in eval mode and without gradients.

    All ranks call this with equal weights and end with equal weights. A batch is divided into parts
    (`virtual_replicas`), which the ranks take in turn; their losses are summed. BatchNorm, mixup and dropout see one
    part at a time, with random numbers that depend on (seed, epoch, update, part), so the number of ranks does not
    change the result.

    Args:
        model: Returns `.logits` of shape (B, C) for `pixel_values`, or is a `HeldModel` whose loss reads no labels;
            not wrapped.
        data: The `train` split is trained on. The `evaluation` split, if there is one, is evaluated before the first
            epoch, after every `recipe.evaluate_every`-th epoch and after the last.
        processor: Makes the pixel values; the training transform uses its size and normalisation.
        recipe: How to train.
        accelerator: The ranks. Its precision and its gradient accumulation are ignored; the recipe has its own.
        teacher: Returns logits of the same classes, or outputs of the same shapes for a model without labels, which
            learns from it alone; moved to the device, and frozen and in eval mode during the training.
        teacher_processor: Image processor of the teacher, if it normalises differently from the student's.
        eval_batch_size: Images in an evaluation batch on each rank.
        num_workers: Loader processes on each rank; None chooses them.
        save: Called on all ranks with a name, a model and the epoch's entry of the history: "last" after each epoch
            (and "ema", with the averaged weights), "best" if the figure `judging.best` is the best of the trained
            epochs, "epoch-010" and so on for `save_every`. `recipe.best` selects the weights of "best", and those that
            `model` ends with.
        run: An open folder for snapshots and the log; an unfinished run in it is resumed.
        judging: How the model is measured; by default as a classifier, see `judging_of`.

    Returns:
        `history`: for each epoch `epoch`, `train_loss`, `lr` (of the last update), `images_per_second` and the figures
        of `judging`; epoch 0, before training, has only these figures. `best_epoch`: the trained epoch with the
        best figure, or the last one without an evaluation split.

    Raises:
        RecipeError: The batch cannot be divided equally, or the model does not support a setting, or it learns from a
            teacher alone and there is none, or all its parameters are frozen.
        DivergedError: The loss or the gradient is not finite.
        Interrupted: A signal stopped the training; `run` has a snapshot of the last update.
        DatasetError: There is no training split, or it has fewer images than an update has parts, or the model does
            not answer as the images are labelled.
    """
    if not reads_labels(model):
        check_unlabelled(recipe, has_teacher=teacher is not None)
    else:
        require_labels(data)
        if isinstance(model, PreTrainedModel):
            check_problem(model.config, is_multi_label=data.is_multi_label)
            adopt_problem(model.config, is_multi_label=data.is_multi_label)
    if data.is_multi_label and teacher is not None and recipe.distillation == "hard":
        raise RecipeError(
            "finetune.distillation hard takes the top class of the teacher, and each image has a list of classes; set "
            "it to soft or none"
        )
    callbacks: list[Callback] = []
    if run is not None:
        callbacks += [LogCallback(run), SignalCallback(run.interruption), SnapshotCallback(run)]
    if save is not None:
        callbacks.append(CheckpointCallback(save))
    with lent_teacher(teacher):
        trainer = Trainer(
            model,
            data,
            processor,
            recipe,
            accelerator=accelerator,
            options=LoaderOptions(eval_batch_size, num_workers, data.decoding),
            teacher=None if teacher is None else TeacherModel(teacher, teacher_processor),
            judging=judging or judging_of(data),
            callbacks=callbacks,
        )
        history = trainer.fit()
    return {"history": history, "best_epoch": trainer.progress.best_epoch}
