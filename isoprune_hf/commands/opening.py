"""What a stage starts from: data, base, calibration sample, teacher. Everything is checked here, before any work."""

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.logging import get_logger
from transformers import BaseImageProcessor

from isoprune_hf.checkpoint.fingerprint import fingerprint
from isoprune_hf.checkpoint.modeling_isoprune import IsoPruneForImageClassification
from isoprune_hf.checkpoint.stock import stock_processor
from isoprune_hf.data.dataset import ImageData, load_data
from isoprune_hf.data.labels import check_labels
from isoprune_hf.data.loading import CalibrationBatches, LoaderOptions, Ranks, calibration_ids
from isoprune_hf.data.streaming import calibration_split
from isoprune_hf.errors import CheckpointError, DatasetError, IsoPruneError, RecipeError
from isoprune_hf.models import BaseModel, load_base
from isoprune_hf.models.processors import with_transform
from isoprune_hf.pruning.calibration.resumable import ResumableBatches
from isoprune_hf.pruning.deciding.make_plan import recipe_of_scores
from isoprune_hf.pruning.scoring.scores import ImportanceScores
from isoprune_hf.recipes import DATA_CRITERIA, DataRecipe, FinetuneRecipe, PruneRecipe

logger = get_logger(__name__)


def open_data(data: DataRecipe, accelerator: Accelerator) -> ImageData:
    with accelerator.main_process_first():  # one rank fills the cache
        return load_data(data)


def open_scores(prune: PruneRecipe, scores: str | None) -> tuple[PruneRecipe, ImportanceScores | None]:
    """Read a file of scores, and give the recipe that they are cut by; see `recipe_of_scores`."""
    if scores is None:
        return prune, None
    known = ImportanceScores.load(scores)
    return recipe_of_scores(prune, known), known


def open_base(
    prune: PruneRecipe,
    data: DataRecipe,
    images: ImageData | None,
    accelerator: Accelerator,
    *,
    is_scored: bool = False,
    is_replayed: bool = False,
) -> BaseModel:
    if prune.model is None:
        raise RecipeError(
            "prune.model is not set; give --prune.model, as timm/resnet50.a1_in1k, or a recipe with --config"
        )
    replaced = prune.replaced_by_preset()
    if replaced:
        changes = ", ".join(
            f"{name} {value}" + (f" (not {default})" if default is not None else "")
            for name, (default, value) in replaced.items()
        )
        logger.info(f"prune.preset {prune.preset} sets {changes}")
    reads_scores = prune.criterion in DATA_CRITERIA and not is_scored
    needs_data = reads_scores or (prune.data_step is not None and not is_replayed)
    if reads_scores and images is None:
        raise RecipeError(f"criterion {prune.criterion} needs data: give --data.dataset, or take --prune.criterion l1")
    if needs_data and images is None:
        raise RecipeError(f"prune.{prune.data_step} needs data: give --data.dataset, or leave it out")
    if prune.num_labels == "data" and images is None:
        raise RecipeError("prune.num_labels data needs data: give --data.dataset")
    if needs_data and images.train is None:
        raise DatasetError(f"data: {images.name} has no training split to score on; set data.train_split")
    names = images.label_names if images is not None else None
    num_labels = len(names) if prune.num_labels == "data" else prune.num_labels
    base = load_base(
        prune.model,
        prune.pretrained,
        model_args=prune.model_args,
        num_labels=num_labels,
        label_names=names if names is not None and num_labels == len(names) else None,
        seed=prune.seed,
    )
    if images is not None:
        check_labels(images.label_names, base.model.config.id2label)
        if all(label == f"LABEL_{index}" for index, label in base.model.config.id2label.items()):
            base.model.config.id2label = dict(enumerate(names))
            base.model.config.label2id = {label: index for index, label in enumerate(names)}
    base.model.to(accelerator.device)
    base = see_through(base, data)
    if prune.layout != "uniform":
        return base
    processor = stock_processor(base.processor)  # of the whole road, so that all figures are of the same pixels
    if processor is not base.processor and processor.do_center_crop:
        logger.info(
            "prune.layout uniform: the stock image processor crops images with an odd margin up to one pixel further "
            "left or up than the model's own; all figures are those of the stock one"
        )
    return BaseModel(base.model, processor)


def see_through(base: BaseModel, data: DataRecipe) -> BaseModel:
    """Give a model the evaluation transform that the data ask for; the same object where that is its own."""
    processor = with_transform(base.processor, resize=data.resize, interpolation=data.interpolation)
    return base if processor is base.processor else BaseModel(base.model, processor)


def open_calibration(
    prune: PruneRecipe,
    data: DataRecipe,
    images: ImageData | None,
    processor: BaseImageProcessor,
    accelerator: Accelerator,
    *,
    is_scored: bool = False,
    output: str | Path | None = None,
) -> tuple[CalibrationBatches | ResumableBatches | None, dict[str, Any]]:
    """Open the calibration sample; beside an output, what is added up over it is kept until that is written."""
    if prune.data_step is None and (is_scored or prune.criterion not in DATA_CRITERIA):
        return None, {}
    options = {"batches": prune.calibration_batches, "batch_size": prune.batch_size, "seed": prune.seed}
    train = calibration_split(images, prune.calibration_batches * prune.batch_size, prune.seed)
    ids = calibration_ids(len(train), **options)
    sample = {
        "dataset": images.fingerprint,
        "images": len(ids),
        "ids_sha256": hashlib.sha256(json.dumps(ids).encode()).hexdigest(),
        "ids": ids,
    }
    transform = {"resize": data.resize, "interpolation": prune.interpolation or data.interpolation}
    sample |= {name: value for name, value in transform.items() if value is not None}
    processor = with_transform(processor, interpolation=prune.interpolation)
    logger.info(f"score on {len(ids)} images in micro-batches of {prune.batch_size}")
    share = {"rank": accelerator.process_index, "world": accelerator.num_processes}
    batches = CalibrationBatches(
        train,
        processor,
        LoaderOptions(prune.batch_size, data.num_workers, images.decoding),
        batches=prune.calibration_batches,
        seed=prune.seed,
        ranks=Ranks(**share),
    )
    if output is None:
        return batches, sample
    identity = {"sample": sample, "processor": processor.to_json_string(), "decoder": data.decoder, **share}
    identity["batch_size"] = prune.batch_size
    return ResumableBatches(batches, _scoring_folder(output, accelerator), identity, prune.state_minutes), sample


def forget_scoring(output: str | Path, accelerator: Accelerator) -> None:
    """Remove what this rank has kept of the scoring for an output, which is written now."""
    shutil.rmtree(_scoring_folder(output, accelerator), ignore_errors=True)


def _scoring_folder(output: str | Path, accelerator: Accelerator) -> Path:
    return Path(output).parent / f".{Path(output).name}.scoring-{accelerator.process_index}"


def open_teacher(
    student: IsoPruneForImageClassification, recipe: FinetuneRecipe, base: BaseModel | None = None
) -> BaseModel | None:
    """Open the teacher; `auto` is the dense base, unless its weights or its head were never trained."""
    if recipe.distillation == "none" or recipe.teacher == "none":
        return None
    if recipe.teacher == "auto":
        source = student.config.source or {}
        if not source.get("pretrained") or source.get("num_labels"):
            logger.info("no teacher: the dense base has untrained weights")
            return None
        return base or reopen_base(student)
    teacher = load_base(recipe.teacher)
    names = [student.config.id2label[index] for index in sorted(student.config.id2label)]
    check_labels(names, teacher.model.config.id2label)
    return teacher


def reopen_base(model: IsoPruneForImageClassification) -> BaseModel | None:
    """Open the dense base that a folder was cut from; None, with a warning, where it cannot be had."""
    if not (model.config.source or {}).get("name"):
        return None
    try:
        return open_source(model)
    except IsoPruneError as error:
        logger.warning(f"the dense base is not evaluated and does not teach: {error}")
        return None


def open_source(model: IsoPruneForImageClassification, name: str | None = None) -> BaseModel:
    """Open the dense base that a model was cut from.

    Args:
        model: The pruned model.
        name: Where the base lies now, if not where the cut has found it.

    Raises:
        IsoPruneError: It is not known, cannot be opened, or has changed since the cut.
    """
    source = model.config.source or {}
    options = {key: source[key] for key in ("pretrained", "seed", "model_args", "num_labels") if key in source}
    if name and Path(name).is_dir():  # it was saved as it is
        options = {}
    name = name or source.get("name")
    if not name:
        raise RecipeError("config.source names no base that the model was cut from")
    labels = options.get("num_labels")
    names = tuple(model.config.id2label[index] for index in sorted(model.config.id2label)) if labels else None
    base = load_base(name, **options, label_names=names)
    if source.get("fingerprint") not in (None, fingerprint(base.model.model)):
        raise CheckpointError(f"the base {name} has other weights than the one that was cut")
    return base
