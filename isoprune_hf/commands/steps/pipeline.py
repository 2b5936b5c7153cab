"""The steps of the stage `run` after everything is opened; see `run_pipeline`."""

import copy
import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from accelerate import Accelerator
from accelerate.logging import get_logger

from isoprune_hf.checkpoint.fingerprint import fingerprint
from isoprune_hf.checkpoint.folder import replace_file, save_model_folder
from isoprune_hf.checkpoint.modeling_isoprune import IsoPruneForImageClassification
from isoprune_hf.checkpoint.structure import image_size_of
from isoprune_hf.checkpoint.target import CHECKPOINTS, Target
from isoprune_hf.checkpoint.task_forms import TASK_FORMS
from isoprune_hf.commands.stage import Answer
from isoprune_hf.commands.steps.cutting import cut_and_evaluate
from isoprune_hf.commands.steps.opening import Opened, forget_scoring
from isoprune_hf.commands.steps.recording import Records, read_metrics, read_records
from isoprune_hf.commands.steps.results import summarize, write_folder
from isoprune_hf.commands.steps.sources import check_taught, open_teacher
from isoprune_hf.commands.steps.training import Checkpoints, open_run, train_student, writing_result
from isoprune_hf.commands.steps.unfinished import Unfinished, finish, open_unfinished
from isoprune_hf.data.dataset import ImageData, with_encoded_images
from isoprune_hf.data.decoding import Decoding, Rows, read_or_replace, to_pixels
from isoprune_hf.errors import RecipeError
from isoprune_hf.hub.uploads import Uploads
from isoprune_hf.measuring.runtimes.engine import Runtime
from isoprune_hf.measuring.speed import record_measurement, time_models
from isoprune_hf.measuring.timing import Rounds
from isoprune_hf.models import BaseModel, load_base
from isoprune_hf.pruning.plan import PruningPlan
from isoprune_hf.recipes import FinetuneRecipe, resume_identity
from isoprune_hf.reporting.tables import Metrics
from isoprune_hf.tasks.registry import find_task

logger = get_logger(__name__)

_TIMED_PASSES = 20
_WARMUP = 3


@dataclass(frozen=True)
class Cut:
    """The cut model of a run, in memory, with its plan and the figures before the training."""

    model: IsoPruneForImageClassification
    plan: PruningPlan
    metrics: Metrics


def run_pipeline(
    opened: Opened,
    images: ImageData,
    pretrain: FinetuneRecipe,
    finetune: FinetuneRecipe,
    target: Target,
    uploads: Uploads | None,
    *,
    overwrite: bool,
) -> Answer:
    """Train the base if requested, score, cut, finetune, measure and write everything into the target.

    An unfinished run of the target is resumed.

    Returns:
        The table of all models, and the answer of `transformers.pipeline` for one image.

    Raises:
        RecipeError: A setting of the training does not fit the task.
    """
    accelerator, root = opened.accelerator, target.path
    task = find_task(opened.base.model.config)
    if pretrain.epochs and not task.reads_labels:
        raise RecipeError(
            f"pretrain.epochs {pretrain.epochs}: the base is trained with labels, which the task {task.form.task} "
            "does not read; leave it out"
        )
    check_taught(opened.base.model, finetune)
    with open_unfinished(target, _identify(opened, images, pretrain), accelerator, overwrite=overwrite) as work:
        if pretrain.epochs:
            opened = replace(opened, base=_pretrain(opened, images, pretrain, work, overwrite=overwrite))
        cut = _cut(opened, work)
        model, found = _finish_model(opened, images, finetune, cut, work, uploads, overwrite=overwrite)
        accelerator.wait_for_everyone()
        if accelerator.is_main_process:
            finish(work)
    answer = summarize(model, found.metrics, (found.speed or {})["milliseconds"], root / "model", notes=cut.plan.notes)
    if accelerator.is_main_process and images.evaluation is not None:
        image, label = _first_image(images.evaluation, images.decoding, image_size_of(model)[0])
        labels, names = label if isinstance(label, list) else [label], images.label_names
        truth = ", ".join(names[number] for number in labels if number < len(names)) or None
        line = task.try_pipeline(root / "model", image, truth)
        answer = replace(answer, text=f"{answer.text}\n\n{line}")
    accelerator.wait_for_everyone()
    return answer


def _identify(opened: Opened, images: ImageData, pretrain: FinetuneRecipe) -> dict[str, Any]:
    """Return everything that determines the cut of a run."""
    identity = {"the base": fingerprint(opened.base.model.model), **images.identity}
    for section, recipe in (("prune", opened.prune), ("data", opened.data), ("pretrain", pretrain)):
        identity |= {f"{section}.{name}": value for name, value in resume_identity(recipe).items()}
    return identity


def _cut(opened: Opened, work: Unfinished) -> Cut:
    """Score, cut, repair and evaluate, and save the cut model; or open the one that an unfinished run has saved."""
    accelerator, base = opened.accelerator, opened.base
    if (work.pruned / "config.json").is_file():
        model = load_base(str(work.pruned), tasks=TASK_FORMS).model
        model.to(accelerator.device)
        return Cut(model, PruningPlan.load(work.pruned), read_metrics(str(work.pruned)))
    output = str(work.target.path)
    result, metrics = cut_and_evaluate(opened, output)
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        replace_file(work.result / "importance.safetensors", result.scores.save)
        plan = result.plan.to_json()
        save_model_folder(work.pruned, result.model, base.processor, plan=plan, metrics=metrics)
    accelerator.wait_for_everyone()
    forget_scoring(output, accelerator)
    return Cut(result.model, result.plan, metrics)


def _finish_model(
    opened: Opened,
    images: ImageData,
    finetune: FinetuneRecipe,
    cut: Cut,
    work: Unfinished,
    uploads: Uploads | None,
    *,
    overwrite: bool,
) -> tuple[IsoPruneForImageClassification, Records]:
    """Finetune if requested, measure, and write the model; return it with what was written beside it."""
    accelerator, base, folder = opened.accelerator, opened.base, work.result / "model"

    def write(models: Mapping[str, IsoPruneForImageClassification], metrics: Metrics) -> Records:
        found = Records(cut.plan.to_json(), _measure(models, accelerator), metrics)
        write_folder(folder, cut.model, base.processor, accelerator, found)
        return found

    if not finetune.epochs:
        return cut.model, write({"base": base.model, "pruned": cut.model}, cut.metrics)
    teacher = open_teacher(cut.model, finetune, base)
    student = BaseModel(cut.model, base.processor)
    training = open_run(
        work.result,
        student,
        images,
        opened.data,
        finetune,
        teacher,
        accelerator,
        overwrite=overwrite,
        output=work.target.path,
    )
    if training.is_finished and (folder / "config.json").is_file():  # killed before it became the output
        return load_base(str(folder), tasks=TASK_FORMS).model, read_records(str(folder))
    models = {"base": base.model, "pruned": copy.deepcopy(cut.model), "finetuned": cut.model}
    with training:
        trained = train_student(
            student,
            images,
            opened.data,
            finetune,
            accelerator,
            teacher=teacher,
            dense=base,
            checkpoints=Checkpoints(work.result / CHECKPOINTS, training, uploads),
            metrics=cut.metrics,
        )
        with writing_result(training):
            found = write(models, {**cut.metrics, **trained})
        training.finish()
    return cut.model, found


def _measure(models: Mapping[str, IsoPruneForImageClassification], accelerator: Accelerator) -> dict[str, Any]:
    """Measure one image in each model, and describe the measurement."""
    size = image_size_of(models["base"])
    runtime = Runtime()
    timing = time_models(models, size, batch_size=1, runtime=runtime, rounds=Rounds(_TIMED_PASSES, _WARMUP))
    record = record_measurement(accelerator.device, runtime, batch_size=1, repeats=_TIMED_PASSES)
    if timing.busy is not None:
        logger.warning(f"the latency is not recorded: {timing.busy}, so other programs use this machine")
    return {**record, "milliseconds": timing.medians() if timing.busy is None else {}}


def _pretrain(
    opened: Opened, images: ImageData, recipe: FinetuneRecipe, work: Unfinished, *, overwrite: bool
) -> BaseModel:
    """Train the dense base and write it to the folder `base`, from which others reopen it; or open that one."""
    base, accelerator, folder = opened.base, opened.accelerator, work.result / "base"
    if (folder / "config.json").is_file():
        model = load_base(str(folder)).model
        model.to(accelerator.device)
        return BaseModel(model, base.processor)
    logger.info(f"train the dense base, {recipe.epochs} epochs")
    training = open_run(
        work.pretraining,
        base,
        images,
        opened.data,
        recipe,
        None,
        accelerator,
        overwrite=overwrite,
        output=work.target.path,
    )
    checkpoints = Checkpoints(work.pretraining / CHECKPOINTS, training)
    with training:
        train_student(base, images, opened.data, recipe, accelerator, checkpoints=checkpoints)
        base.model.config.source = {
            "name": os.path.abspath(work.target.path / "base"),
            "pretrained": True,
            "seed": opened.prune.seed,
            "model_args": {},
            "fingerprint": fingerprint(base.model.model),
        }
        write_folder(folder, base.model, base.processor, accelerator)
        training.finish()
    return base


def _first_image(split: Rows, decoding: Decoding, channels: int) -> tuple[Any, int | list[int]]:
    """Return the first image of a split for a pipeline, with its label, or its list of labels.

    An image that is not RGB is an array: a pipeline turns all others into RGB.
    """
    decoding = replace(decoding, decoder="pil", channels=channels)
    found = read_or_replace(with_encoded_images(split), 0, decoding)
    return found.image if channels == 3 else to_pixels(found.image).numpy(), found.label
