"""The steps of the stage `finetune` once its output is locked; see `finetune_folder`."""

from dataclasses import dataclass

from accelerate import Accelerator
from accelerate.logging import get_logger

from isoprune_hf.checkpoint.folder import read_json
from isoprune_hf.checkpoint.output_check import check_output
from isoprune_hf.checkpoint.target import CHECKPOINTS, Target
from isoprune_hf.checkpoint.task_forms import TASK_FORMS
from isoprune_hf.commands.stage import Answer
from isoprune_hf.commands.steps.holding_out import settle_holdout
from isoprune_hf.commands.steps.opening import evaluate_on, open_data, with_data_transform
from isoprune_hf.commands.steps.recording import Records, read_records
from isoprune_hf.commands.steps.results import summarize, write_folder
from isoprune_hf.commands.steps.sources import (
    align_images,
    check_taught,
    open_teacher,
    open_with_new_head,
    reopen_base,
)
from isoprune_hf.commands.steps.training import Checkpoints, open_run, train_student, writing_result
from isoprune_hf.data.dataset import ImageData
from isoprune_hf.data.labels import require_labels
from isoprune_hf.hub.uploads import Uploads
from isoprune_hf.models import BaseModel, load_base
from isoprune_hf.models.base import require_finite_base
from isoprune_hf.recipes import DataRecipe, FinetuneRecipe
from isoprune_hf.reporting.tables import on_same_images
from isoprune_hf.tasks.registry import find_task
from isoprune_hf.training.run import is_begun, read_run

logger = get_logger(__name__)


@dataclass(frozen=True)
class Source:
    """The model that is finetuned.

    Attributes:
        name: Its folder or name.
        takes_new_head: Its head is replaced by a new one for the classes of the data.
    """

    name: str
    takes_new_head: bool


def finetune_folder(
    source: Source,
    target: Target,
    data: DataRecipe,
    finetune: FinetuneRecipe,
    accelerator: Accelerator,
    uploads: Uploads | None,
    *,
    overwrite: bool,
) -> Answer:
    """Train a model and write the result to the target; an unfinished run of that folder is resumed.

    Returns:
        The table of the models. If the target already holds the result of this run, it is that one's.
    """
    folder = target.path
    known = read_run(folder / CHECKPOINTS)
    holds_unfinished = is_begun(folder / CHECKPOINTS) and not (known is not None and known["finished"])
    data = settle_holdout(data, source.name)
    images = open_data(data, accelerator)
    student, carried, images = _open_student(source, images, data, finetune)
    check_taught(student.model, finetune)
    has_dense = not source.takes_new_head  # the dense model has other classes than a new head
    teacher = open_teacher(student.model, finetune) if has_dense or finetune.teacher != "auto" else None
    if teacher is not None:
        require_finite_base(teacher, "the teacher")
    training = open_run(folder, student, images, data, finetune, teacher, accelerator, overwrite=overwrite)
    if training.is_finished and not overwrite and (folder / "config.json").is_file():
        logger.info(f"--output {folder} contains the result of this run; retrain it with --overwrite true")
        finished = load_base(str(folder), tasks=TASK_FORMS).model
        return summarize(finished, read_json(folder, "metrics.json") or {}, {}, folder)
    check_output(folder, overwrite=overwrite, holds_run=holds_unfinished)
    measured = {"images": None if images.evaluation is None else len(images.evaluation)}
    metrics = on_same_images(carried.metrics, images.with_provenance({}) | measured)
    dense = teacher if finetune.teacher == "auto" else None
    is_measured_against = not find_task(student.model.config).reads_labels
    if has_dense and images.evaluation is not None and (is_measured_against or "base" not in metrics):
        dense = dense or reopen_base(student.model)
    if dense is not None and images.evaluation is not None and "base" not in metrics:
        metrics["base"] = evaluate_on(images, dense.model, student.processor, data, accelerator)
    checkpoints = Checkpoints(folder / CHECKPOINTS, training, uploads)
    with training:
        metrics |= train_student(
            student,
            images,
            data,
            finetune,
            accelerator,
            teacher=teacher,
            dense=dense,
            checkpoints=checkpoints,
            metrics=metrics,
        )
        with writing_result(training):
            write_folder(target, *student, accelerator, Records(carried.plan, carried.speed, metrics))
        training.finish()
    return summarize(student.model, metrics, {}, folder)


def _open_student(
    source: Source, images: ImageData, data: DataRecipe, finetune: FinetuneRecipe
) -> tuple[BaseModel, Records, ImageData]:
    """Open the model to train, the parts of its folder that the result keeps, and the images with its labels."""
    carried = read_records(source.name)
    if source.takes_new_head:
        require_labels(images)
        names, problem = images.label_names, images.problem_type
        found = open_with_new_head(source.name, names, finetune.seed, problem)
    else:
        found = load_base(source.name, tasks=TASK_FORMS)
    require_finite_base(found, source.name)
    student = with_data_transform(found, data)
    images = align_images(images, student.model)
    if student is not found or source.takes_new_head:
        # Figures measured with another transform or head than that of the new folder are not comparable.
        carried = Records(carried.plan, carried.speed, {})
    return student, carried, images
