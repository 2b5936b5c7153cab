"""The steps of the stage `run` after everything is opened; see `run_pipeline`."""

import os
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.logging import get_logger

from isoprune_hf.checkpoint.fingerprint import fingerprint
from isoprune_hf.checkpoint.folder import replace_file
from isoprune_hf.checkpoint.modeling_isoprune import IsoPruneForImageClassification
from isoprune_hf.checkpoint.structure import image_size_of
from isoprune_hf.commands.stage import Answer
from isoprune_hf.commands.steps.cutting import cut_base
from isoprune_hf.commands.steps.opening import Opened, evaluate_on, forget_scoring
from isoprune_hf.commands.steps.results import Metrics, smoke_test, summarize, write_folder
from isoprune_hf.commands.steps.sources import open_teacher
from isoprune_hf.commands.steps.training import CHECKPOINTS, Checkpoints, train_student
from isoprune_hf.data.dataset import ImageData, with_encoded_images
from isoprune_hf.data.decoding import Decoding, Rows, read_or_replace, to_pixels
from isoprune_hf.errors import RecipeError
from isoprune_hf.hub.uploads import Uploads
from isoprune_hf.measuring.speed import measure_latency, record_measurement
from isoprune_hf.models import BaseModel
from isoprune_hf.recipes import FinetuneRecipe

logger = get_logger(__name__)

_TIMED_PASSES = 20


def clear_output(root: Path, used: dict[str, str | None], accelerator: Accelerator) -> None:
    """Remove the results of an earlier run, so that none of them is mistaken for one of this run.

    Args:
        root: Output of the run.
        used: Models that this run reads, by their settings.
        accelerator: The ranks; the main process removes.

    Raises:
        RecipeError: One of the models lies in the output.
    """
    for setting, path in used.items():
        if path and root.resolve() in Path(path).resolve().parents:
            raise RecipeError(
                f"--output {root} contains {setting} ({path}), which would be overwritten; choose another folder"
            )
    if accelerator.is_main_process:
        for name in ("base", CHECKPOINTS, "model"):
            shutil.rmtree(root / name, ignore_errors=True)
    accelerator.wait_for_everyone()


def run_pipeline(
    opened: Opened,
    images: ImageData,
    pretrain: FinetuneRecipe,
    finetune: FinetuneRecipe,
    output: str,
    uploads: Uploads | None,
) -> Answer:
    """Train the base if requested, score, cut, finetune, measure and write everything into `output`.

    Returns:
        The table of all models, and the class of one image by `transformers.pipeline`.
    """
    root, base, accelerator = Path(output), opened.base, opened.accelerator
    if pretrain.epochs:
        _pretrain(opened, images, pretrain, root)
    result = cut_base(opened, output)
    metrics: Metrics = {
        name: evaluate_on(images, model, base.processor, opened.data, accelerator)
        for name, model in (("base", base.model), ("pruned", result.model))
    }
    if accelerator.is_main_process:
        replace_file(root / "importance.safetensors", result.scores.save)
    forget_scoring(output, accelerator)
    models = {"base": base.model, "pruned": result.model}
    if finetune.epochs:
        teacher = open_teacher(result.model, finetune, base)
        models = {"base": base.model, "pruned": _copy(result.model), "finetuned": result.model}
        metrics |= train_student(
            BaseModel(result.model, base.processor),
            images,
            opened.data,
            finetune,
            accelerator,
            teacher=teacher,
            checkpoints=Checkpoints(root / CHECKPOINTS, uploads=uploads),
            metrics=metrics,
        )
    speed = _measure(models, accelerator)
    folder = root / "model"
    write_folder(
        folder,
        result.model,
        base.processor,
        accelerator,
        plan=result.plan.to_json(),
        metrics=metrics,
        speed=speed,
    )
    answer = summarize(result.model, metrics, speed["milliseconds"], folder, notes=result.plan.notes)
    if accelerator.is_main_process and images.evaluation is not None:
        image, label = _first_image(images.evaluation, images.decoding, image_size_of(base.model)[0])
        line = smoke_test(folder, image, images.label_names[label])
        answer = replace(answer, text=f"{answer.text}\n\n{line}")
    accelerator.wait_for_everyone()
    return answer


def _measure(models: Mapping[str, IsoPruneForImageClassification], accelerator: Accelerator) -> dict[str, Any]:
    """Measure one image in each model, and describe the measurement."""
    size = image_size_of(models["base"])
    latency = measure_latency(models, size, batch_size=1, precision="no", backend="eager", repeats=_TIMED_PASSES)
    record = record_measurement(
        accelerator.device, batch_size=1, precision="no", backend="eager", repeats=_TIMED_PASSES
    )
    return {**record, "milliseconds": latency}


def _pretrain(opened: Opened, images: ImageData, recipe: FinetuneRecipe, root: Path) -> None:
    """Train the dense base in place and write it to the folder `base`, from which others reopen it."""
    base = opened.base
    logger.info(f"train the dense base, {recipe.epochs} epochs")
    train_student(base, images, opened.data, recipe, opened.accelerator)
    base.model.config.source = {
        "name": os.path.abspath(root / "base"),
        "pretrained": True,
        "seed": opened.prune.seed,
        "model_args": {},
        "fingerprint": fingerprint(base.model.model),
    }
    write_folder(root / "base", base.model, base.processor, opened.accelerator)


def _first_image(split: Rows, decoding: Decoding, channels: int) -> tuple[Any, int]:
    """Return the first image of a split for a pipeline, with its label.

    An image that is not RGB is an array: a pipeline turns all others into RGB.
    """
    decoding = replace(decoding, decoder="pil", channels=channels)
    found = read_or_replace(with_encoded_images(split), 0, decoding)
    return found.image if channels == 3 else to_pixels(found.image).numpy(), found.label


def _copy(model: IsoPruneForImageClassification) -> IsoPruneForImageClassification:
    """Copy a model with its weights."""
    copy: IsoPruneForImageClassification = type(model).from_pretrained(
        None, config=model.config, state_dict=model.state_dict()
    )
    return copy
