"""The stages of the command line: each puts the pieces of the road in their order and writes what they made."""

import shutil
from pathlib import Path

from accelerate import Accelerator
from accelerate.logging import get_logger
from torch import nn
from transformers import BaseImageProcessor

from isoprune_hf.checkpoint.folder import check_output, read_json, replace_file
from isoprune_hf.checkpoint.modeling_isoprune import IsoPruneForImageClassification
from isoprune_hf.commands.finetune import CHECKPOINTS, open_run, train_student
from isoprune_hf.commands.opening import (
    forget_scoring,
    open_base,
    open_calibration,
    open_data,
    open_scores,
    open_teacher,
    reopen_base,
    see_through,
)
from isoprune_hf.commands.results import Answer, Metrics, summarize, try_out, write_folder
from isoprune_hf.data.dataset import ImageData
from isoprune_hf.data.labels import check_labels
from isoprune_hf.errors import CheckpointError, DatasetError, RecipeError, WriteError
from isoprune_hf.evaluation.evaluate import evaluate_model
from isoprune_hf.hub.uploads import Uploads, open_uploads
from isoprune_hf.measuring.speed import measure_latency, record_measurement
from isoprune_hf.models import BaseModel, load_base
from isoprune_hf.pruning.prune import PruneResult, prune_model
from isoprune_hf.pruning.score import score_model
from isoprune_hf.pruning.scoring.scores import ImportanceScores
from isoprune_hf.recipes import DataRecipe, FinetuneRecipe, PruneRecipe, recipe_to_dict
from isoprune_hf.training.run import is_begun, read_run

logger = get_logger(__name__)


def run_score(accelerator: Accelerator, prune: PruneRecipe, data: DataRecipe, output: str, overwrite: bool) -> str:
    """Score the base and write `importance.safetensors`."""
    target = check_output(output, overwrite=overwrite, is_file=True)
    images = open_data(data, accelerator) if data.dataset else None
    base = open_base(prune, data, images, accelerator)
    batches, sample = open_calibration(prune, data, images, base.processor, accelerator, output=output)
    scores = score_model(base.model, prune, batches, accelerator, sample=sample)
    accelerator.wait_for_everyone()  # each has looked at what is there
    if accelerator.is_main_process:
        replace_file(target, scores.save)
    forget_scoring(output, accelerator)
    return f"scores of {len(scores.scores)} groups are in {output}"


def run_prune(
    accelerator: Accelerator,
    prune: PruneRecipe,
    data: DataRecipe,
    output: str,
    overwrite: bool,
    scores: str | None,
    push_to_hub: str | None = None,
) -> Answer:
    """Cut the base and write the folder of the pruned model."""
    folder = check_output(output, overwrite=overwrite)
    uploads = open_uploads(push_to_hub, accelerator)
    prune, known = open_scores(prune, scores)
    images = open_data(data, accelerator) if data.dataset else None
    base = open_base(prune, data, images, accelerator, is_scored=known is not None)
    result = _prune(prune, data, images, base, accelerator, known, output)
    metrics = {}
    if images is not None and images.evaluation is not None:
        metrics = {
            "base": _evaluate(base.model, images, base.processor, data, accelerator),
            "pruned": _evaluate(result.model, images, base.processor, data, accelerator),
        }
    achieved = result.plan.achieved
    latency = {name: figures["latency_ms"] for name, figures in achieved.items() if "latency_ms" in figures}
    speed = {**result.plan.settings["latency"], "milliseconds": latency} if latency else None
    plan = result.plan.to_json()
    write_folder(folder, result.model, base.processor, accelerator, plan=plan, metrics=metrics, speed=speed)
    forget_scoring(output, accelerator)
    return _send(uploads, folder, summarize(result.model, metrics, latency, folder))


def run_finetune(
    accelerator: Accelerator,
    model: str,
    data: DataRecipe,
    finetune: FinetuneRecipe,
    output: str,
    overwrite: bool,
    push_to_hub: str | None = None,
    push_every: int | None = None,
) -> Answer:
    """Train a pruned model and write its folder anew, under another name; an unfinished run of it goes on."""
    known = read_run(Path(output) / CHECKPOINTS)
    was_finished = known is not None and known["finished"]
    has_run = is_begun(Path(output) / CHECKPOINTS)
    folder = check_output(output, overwrite=overwrite, holds_run=has_run)
    if Path(model).resolve() == folder.resolve():
        raise RecipeError("--output must be another folder than --model")
    uploads = open_uploads(push_to_hub, accelerator, push_every)
    images = open_data(data, accelerator)
    found = load_base(model)
    start = see_through(found, data)
    check_labels(images.label_names, start.model.config.id2label)
    # Figures of pixels that the new folder does not make would not be comparable.
    metrics = dict(read_json(model, "metrics.json") or {}) if start is found else {}
    teacher = open_teacher(start.model, finetune)
    run = open_run(folder, start, images, data, finetune, teacher, accelerator, overwrite=overwrite)
    if run.is_finished and not overwrite and (folder / "config.json").is_file():
        logger.info(f"--output {output} holds the result of this very run; train it again with --overwrite true")
        answer = summarize(load_base(output).model, read_json(output, "metrics.json") or {}, {}, folder)
        return _send(uploads, folder, answer)
    check_output(output, overwrite=overwrite, holds_run=has_run and not was_finished)
    if images.evaluation is not None:
        dense = teacher if teacher is not None and finetune.teacher == "auto" else None
        if "base" not in metrics:
            dense = dense or reopen_base(start.model)
        if "base" not in metrics and dense is not None:
            metrics["base"] = _evaluate(dense.model, images, start.processor, data, accelerator)
    with run:
        metrics |= train_student(
            accelerator, start, images, data, finetune, teacher, folder / CHECKPOINTS, metrics, run, uploads
        )
        plan = Path(model) / "pruning_plan.json"
        try:
            write_folder(
                folder,
                start.model,
                start.processor,
                accelerator,
                plan=plan.read_text() if plan.is_file() else None,
                metrics=metrics,
                speed=read_json(model, "speed.json"),
                keep=CHECKPOINTS,
            )
        except CheckpointError as error:
            raise WriteError(f"{error}; the training is saved, and the same command writes its result") from error
        run.finish()
    return _send(uploads, folder, summarize(start.model, metrics, {}, folder))


def run_all(
    accelerator: Accelerator,
    prune: PruneRecipe,
    data: DataRecipe,
    pretrain: FinetuneRecipe,
    finetune: FinetuneRecipe,
    output: str,
    overwrite: bool,
    push_to_hub: str | None = None,
    push_every: int | None = None,
) -> Answer:
    """Take the whole road: base, scores, cut, finetuning, evaluation, folder, card, and a look through `pipeline`."""
    root = check_output(output, overwrite=overwrite)
    if finetune.max_minutes is not None:
        raise RecipeError(
            "finetune.max_minutes is for `isoprune finetune`, which goes on where it ended; run does not"
        )
    uploads = open_uploads(push_to_hub, accelerator, push_every)
    images = open_data(data, accelerator)
    if images.evaluation is None:
        raise DatasetError(f"data: {images.name} has no split {data.eval_split!r} to evaluate on; set data.eval_split")
    base = open_base(prune, data, images, accelerator)
    _clear(root, {"prune.model": prune.model, "finetune.teacher": finetune.teacher}, accelerator)
    if pretrain.epochs:
        logger.info(f"train the dense base, {pretrain.epochs} epochs")
        train_student(accelerator, base, images, data, pretrain, None, None, {})
        base.model.config.source = {
            "name": str(root / "base"),
            "pretrained": True,
            "seed": prune.seed,
            "model_args": {},
        }
        write_folder(root / "base", base.model, base.processor, accelerator)
    result = _prune(prune, data, images, base, accelerator, None, output)
    metrics: Metrics = {
        "base": _evaluate(base.model, images, base.processor, data, accelerator),
        "pruned": _evaluate(result.model, images, base.processor, data, accelerator),
    }
    if accelerator.is_main_process:
        replace_file(root / "importance.safetensors", result.scores.save)
    forget_scoring(output, accelerator)
    speed = {"base": base.model, "pruned": result.model}
    student = BaseModel(result.model, base.processor)
    if finetune.epochs:
        teacher = open_teacher(result.model, finetune, base)
        before = _copy(result.model)
        speed = {"base": base.model, "pruned": before, "finetuned": result.model}
        metrics |= train_student(
            accelerator, student, images, data, finetune, teacher, root / CHECKPOINTS, metrics, uploads=uploads
        )
    measured = {"batch_size": 1, "precision": "no", "backend": "eager", "repeats": 20}
    latency = measure_latency(speed, base.model.config.image_size, **measured)
    record = record_measurement(accelerator.device, **measured)
    folder = root / "model"
    write_folder(
        folder,
        result.model,
        base.processor,
        accelerator,
        plan=result.plan.to_json(),
        metrics=metrics,
        speed={**record, "milliseconds": latency},
    )
    answer = summarize(result.model, metrics, latency, folder)
    lines = [answer.text]
    if accelerator.is_main_process:
        lines.append(try_out(folder, images))
    accelerator.wait_for_everyone()
    return _send(uploads, folder, answer._replace(text="\n\n".join(lines)))


def _send(uploads: Uploads | None, folder: Path, answer: Answer) -> Answer:
    """Send the result of a stage, and say where it is now."""
    if uploads is None:
        return answer
    url = uploads.finish(folder)
    return answer._replace(text=f"{answer.text}\n\nIt is at {url}", figures={**answer.figures, "url": url})


def _clear(root: Path, used: dict[str, str | None], accelerator: Accelerator) -> None:
    """Remove what an earlier run left, so that nothing of it is taken for a result of this one."""
    for name, path in used.items():
        if path and root.resolve() in Path(path).resolve().parents:
            raise RecipeError(
                f"--output {root} holds {name} ({path}), which would be overwritten; choose another folder"
            )
    if accelerator.is_main_process:
        for name in ("base", CHECKPOINTS, "model"):
            shutil.rmtree(root / name, ignore_errors=True)
    accelerator.wait_for_everyone()


def _copy(model: IsoPruneForImageClassification) -> IsoPruneForImageClassification:
    """Copy a model with its weights."""
    return type(model).from_pretrained(None, config=model.config, state_dict=model.state_dict())


def _prune(
    prune: PruneRecipe,
    data: DataRecipe,
    images: ImageData | None,
    base: BaseModel,
    accelerator: Accelerator,
    scores: ImportanceScores | None,
    output: str,
) -> PruneResult:
    options = {"is_scored": scores is not None, "output": output}
    batches, sample = open_calibration(prune, data, images, base.processor, accelerator, **options)
    result = prune_model(base.model, prune, batches, accelerator, scores=scores, sample=sample)
    if images is not None:
        result.model.config.recipe["data"] = recipe_to_dict(data)
    return result


def _evaluate(
    model: nn.Module, images: ImageData, processor: BaseImageProcessor, data: DataRecipe, accelerator: Accelerator
) -> dict[str, float | int]:
    model.to(accelerator.device)
    options = {"batch_size": data.batch_size, "num_workers": data.num_workers, "decoding": images.decoding}
    return evaluate_model(model, images.evaluation, processor, accelerator=accelerator, **options)
