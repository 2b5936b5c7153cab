"""Train a student for the stages that train: `open_run` identifies a resumable run, `train_student` trains."""

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.logging import get_logger
from torch import nn
from transformers import BaseImageProcessor

from isoprune_hf.checkpoint.fingerprint import fingerprint
from isoprune_hf.checkpoint.folder import save_model_folder
from isoprune_hf.checkpoint.modeling_isoprune import IsoPruneForImageClassification
from isoprune_hf.checkpoint.target import CHECKPOINTS
from isoprune_hf.commands.steps.estimating import log_training
from isoprune_hf.data.dataset import ImageData
from isoprune_hf.data.decoding import Rows
from isoprune_hf.data.loading import LoaderOptions
from isoprune_hf.errors import CheckpointError, ConflictError, WriteError
from isoprune_hf.evaluation.predictions import Figures
from isoprune_hf.hub.uploads import Uploads
from isoprune_hf.models import BaseModel
from isoprune_hf.pruning.cost.macs import count_cost
from isoprune_hf.recipes import DataRecipe, FinetuneRecipe, recipe_to_dict, resume_identity
from isoprune_hf.reporting.tables import Metrics
from isoprune_hf.tasks.registry import find_task
from isoprune_hf.tasks.task import Task
from isoprune_hf.training.finetune import finetune
from isoprune_hf.training.judging import Judging
from isoprune_hf.training.run import RunSettings, TrainingRun

logger = get_logger(__name__)


@dataclass(frozen=True)
class Checkpoints:
    """Folder of a training's checkpoints.

    Attributes:
        folder: Place of the checkpoints, each in a folder of its name.
        run: The resumable run that trains; a checkpoint that cannot be written does not end it.
        uploads: Uploads that are offered the last checkpoint of an epoch.
    """

    folder: Path
    run: TrainingRun | None = None
    uploads: Uploads | None = None

    def save(self, name: str, student: BaseModel, epoch: int) -> None:
        """Write a checkpoint; the main process calls this.

        Raises:
            CheckpointError: It cannot be written, and there is no run whose snapshots replace it.
        """
        try:
            save_model_folder(self.folder / name, student.model, student.processor)
            if self.uploads is not None and name == "last":
                self.uploads.offer(self.folder / name, epoch)
        except CheckpointError as error:
            if self.run is None:
                raise
            logger.warning(f"{error}; training continues")


def open_run(
    folder: Path,
    student: BaseModel,
    images: ImageData,
    data: DataRecipe,
    recipe: FinetuneRecipe,
    teacher: BaseModel | None,
    accelerator: Accelerator,
    *,
    overwrite: bool,
    output: Path | None = None,
) -> TrainingRun:
    """Prepare the resumable run of a folder; nothing is written before its block is entered.

    Args:
        folder: Place of the run's checkpoints.
        student: The model to train.
        images: The labelled images.
        data: How they are read.
        recipe: How to train.
        teacher: The model that teaches.
        accelerator: The ranks.
        overwrite: Replace an unfinished run of other settings.
        output: Output to name in errors; the default is the folder.
    """
    is_cached = recipe.teacher_cache is not None
    identity: dict[str, Any] = {
        "the model": fingerprint(student.model),
        "the teacher": None if teacher is None else fingerprint(teacher.model),
        **images.identity,
        "the image processor": json.loads(student.processor.to_json_string()),
    }
    for section, settings in (("data", data), ("finetune", recipe)):
        identity |= {f"{section}.{name}": value for name, value in resume_identity(settings).items()}
    identity["finetune.teacher_cache"] = is_cached  # the place of the cache may change
    return TrainingRun(
        folder / CHECKPOINTS,
        identity,
        accelerator,
        RunSettings(
            snapshot_every=recipe.state_every,
            snapshot_minutes=recipe.state_minutes,
            max_minutes=recipe.max_minutes,
            log_every=recipe.log_every,
            tracker=recipe.tracker,
            flops=count_training_flops(student.model, None if teacher is None or is_cached else teacher.model),
            peak_tflops=recipe.peak_tflops,
        ),
        overwrite=overwrite,
        output=output,
    )


@contextmanager
def writing_result(training: TrainingRun) -> Iterator[None]:
    """Raise an error that tells whether the training is saved, if the result cannot be written within the context.

    Raises:
        WriteError: The result cannot be written.
    """
    try:
        yield
    except ConflictError:
        raise  # the result is complete in another place
    except CheckpointError as error:
        if training.has_state:
            raise WriteError(f"{error}; the training is saved: rerun the same command to write its result") from error
        raise WriteError(f"{error}; no state of the training could be saved either") from error


def count_training_flops(
    student: IsoPruneForImageClassification, teacher: IsoPruneForImageClassification | None
) -> float:
    """Count the floating-point operations of a training on one image.

    Two for each multiply-add: the student's forward pass, twice as much for its backward pass, the teacher's forward.
    """
    return 2.0 * (3 * count_cost(student).macs + (0 if teacher is None else count_cost(teacher).macs))


def _record_training(student: IsoPruneForImageClassification, data: DataRecipe, recipe: FinetuneRecipe) -> None:
    """Record in the config, in place, that a student is finetuned, and how."""
    config = student.config
    config.stage = "finetuned"
    sections = {"data": recipe_to_dict(data), "finetune": recipe_to_dict(recipe)}
    config.recipe = {**(config.recipe or {}), **sections}


def train_student(
    student: BaseModel,
    images: ImageData,
    data: DataRecipe,
    recipe: FinetuneRecipe,
    accelerator: Accelerator,
    *,
    teacher: BaseModel | None = None,
    dense: BaseModel | None = None,
    checkpoints: Checkpoints | None = None,
    metrics: Metrics | None = None,
) -> Metrics:
    """Train a student in place.

    Args:
        student: The model to train and its image processor; a dense one becomes a base, others become finetuned.
        images: The labelled images.
        data: How they are read.
        recipe: How to train.
        accelerator: The ranks.
        teacher: The model that teaches.
        dense: The dense base, by which tasks without labels are measured; by default the teacher.
        checkpoints: Place of the checkpoints; without it none are written.
        metrics: Known figures; those of the pruned model are kept.

    Returns:
        Figures before the training, if they were not known, and after it. Empty without an evaluation split.
    """
    run = None if checkpoints is None else checkpoints.run
    is_dense = student.model.config.stage == "base"
    if checkpoints is not None and run is None and accelerator.is_main_process:
        shutil.rmtree(checkpoints.folder, ignore_errors=True)  # checkpoints of an earlier run
    if not is_dense:
        _record_training(student.model, data, recipe)

    if recipe.epochs and images.train is not None and not (run is not None and run.has_state):
        student.model.to(accelerator.device)
        log_training(student, images, recipe, teacher, accelerator.num_processes)

    def save(name: str, model: nn.Module, entry: dict[str, Any]) -> None:
        if checkpoints is not None and accelerator.is_main_process:
            if not isinstance(model, IsoPruneForImageClassification):
                raise TypeError(f"a checkpoint needs an isoprune model, got {type(model).__name__}")
            checkpoints.save(name, student._replace(model=model), entry["epoch"])
        accelerator.wait_for_everyone()

    task, reference = find_task(student.model.config), dense or teacher
    if reference is not None and not task.reads_labels:
        reference.model.to(accelerator.device)
    history = finetune(
        student.model,
        images,
        student.processor,
        recipe,
        accelerator=accelerator,
        teacher=None if teacher is None else teacher.model,
        teacher_processor=None if teacher is None else teacher.processor,
        eval_batch_size=data.batch_size,
        num_workers=data.num_workers,
        save=None if checkpoints is None else save,
        run=run,
        judging=Judging(partial(_evaluate, task, reference), task.figures[0]),
    )["history"]
    if images.evaluation is None:
        return {}
    first, last = (
        images.with_provenance(
            {key: history[at][key] for key in (*task.figures, "images", "broken") if key in history[at]}
        )
        for at in (0, -1)
    )
    return {"base": last} if is_dense else {"pruned": (metrics or {}).get("pruned", first), "finetuned": last}


def _evaluate(
    task: Task,
    dense: BaseModel | None,
    model: nn.Module,
    split: Rows,
    processor: BaseImageProcessor,
    options: LoaderOptions,
    *,
    accelerator: Accelerator | None,
) -> Figures:
    """Return the figures of a task, see `Task.evaluate`."""
    if not isinstance(model, IsoPruneForImageClassification):
        raise TypeError(f"an evaluation needs an isoprune model, got {type(model).__name__}")
    reference = None if dense is None else dense.model
    return task.evaluate(model, reference, split, processor, options, accelerator=accelerator)
