"""The training of a student, in the stages that train: what identifies a run, and what it leaves as checkpoints."""

import json
import shutil
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.logging import get_logger
from torch import nn

from isoprune_hf.checkpoint.fingerprint import fingerprint
from isoprune_hf.checkpoint.folder import save_model_folder
from isoprune_hf.checkpoint.modeling_isoprune import IsoPruneForImageClassification
from isoprune_hf.commands.results import Metrics
from isoprune_hf.data.dataset import ImageData
from isoprune_hf.errors import CheckpointError
from isoprune_hf.hub.uploads import Uploads
from isoprune_hf.models import BaseModel
from isoprune_hf.pruning.cost.macs import count_cost
from isoprune_hf.recipes import DataRecipe, FinetuneRecipe, recipe_to_dict
from isoprune_hf.training.finetune import finetune
from isoprune_hf.training.run import RunSettings, TrainingRun

logger = get_logger(__name__)

CHECKPOINTS = "checkpoints"  # inside an output
# Settings that change nothing in the weights; what the data are is told by their fingerprint.
_FREE = {
    "save_every",
    "state_every",
    "state_minutes",
    "log_every",
    "tracker",
    "rank_minutes",
    "max_minutes",
    "peak_tflops",
}
_FREE |= {"dataset", "revision", "batch_size", "num_workers", "max_broken"}


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
) -> TrainingRun:
    """Prepare the run of a folder; nothing is written before its block is entered."""
    identity: dict[str, Any] = {
        "the model": fingerprint(student.model),
        "the teacher": None if teacher is None else fingerprint(teacher.model),
        "the data set": images.fingerprint,
        "the image processor": json.loads(student.processor.to_json_string()),
        "finetune.batch_size": recipe.batch_size,
    }
    for section, settings in (("data", data), ("finetune", recipe)):
        values = recipe_to_dict(settings).items()
        identity |= {f"{section}.{name}": value for name, value in values if name not in _FREE}
    is_cached = identity["finetune.teacher_cache"] = recipe.teacher_cache is not None  # wherever that is
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
    )


def count_training_flops(
    student: IsoPruneForImageClassification, teacher: IsoPruneForImageClassification | None
) -> float:
    """Count the floating-point operations that training on one image takes.

    Two for each multiply-add: the student's forward pass, twice as much for its backward pass, the teacher's forward.
    """
    return 2.0 * (3 * count_cost(student).macs + (0 if teacher is None else count_cost(teacher).macs))


def train_student(
    accelerator: Accelerator,
    student: BaseModel,
    images: ImageData,
    data: DataRecipe,
    recipe: FinetuneRecipe,
    teacher: BaseModel | None,
    checkpoints: Path | None,
    metrics: Metrics,
    run: TrainingRun | None = None,
    uploads: Uploads | None = None,
) -> Metrics:
    """Train the student in place; returns its figures before (where they are not known) and after."""
    dense = student.model.config.stage == "base"
    if run is None and checkpoints is not None and accelerator.is_main_process:
        shutil.rmtree(checkpoints, ignore_errors=True)  # those of an earlier run
    if not dense:
        student.model.config.stage = "finetuned"
        student.model.config.recipe = {
            **(student.model.config.recipe or {}),
            "data": recipe_to_dict(data),
            "finetune": recipe_to_dict(recipe),
        }

    def save(name: str, model: nn.Module, entry: dict[str, Any]) -> None:
        if accelerator.is_main_process:
            try:
                save_model_folder(checkpoints / name, model, student.processor)
                if uploads is not None and name == "last":
                    uploads.offer(checkpoints / name, entry["epoch"])
            except CheckpointError as error:
                if run is None:
                    raise
                logger.warning(f"{error}; training goes on")  # the run has its snapshots
        accelerator.wait_for_everyone()

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
    )["history"]
    if images.evaluation is None:
        return {}
    keys = ("top1", "top5", "loss", "ece", "images", "broken")
    first, last = ({key: history[at][key] for key in keys if key in history[at]} for at in (0, -1))
    return {"pruned": metrics.get("pruned", first), "finetuned": last} if not dense else {"base": last}
