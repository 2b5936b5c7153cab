"""Open the inputs of a stage: images, base model, scores and calibration sample.

Everything is checked here, before any work. Stages that score or cut call `open_inputs`, others `open_data`.
"""

import hashlib
import json
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.logging import get_logger
from transformers import BaseImageProcessor

from isoprune_hf.checkpoint.image_processor import channels_of
from isoprune_hf.checkpoint.modeling_isoprune import IsoPruneForImageClassification
from isoprune_hf.checkpoint.stock import stock_processor
from isoprune_hf.checkpoint.task_forms import IMAGE_CLASSIFICATION, TASK_FORMS
from isoprune_hf.commands.steps.settling import model_of
from isoprune_hf.commands.steps.sources import align_images, class_names
from isoprune_hf.commands.steps.timing import move
from isoprune_hf.data.dataset import ImageData, load_data
from isoprune_hf.data.decoding import PILLOW_CHANNELS, Rows
from isoprune_hf.data.labels import require_labels
from isoprune_hf.data.loading import CalibrationBatches, LoaderOptions, Ranks, calibration_ids
from isoprune_hf.data.streaming import calibration_split
from isoprune_hf.errors import DatasetError, RecipeError
from isoprune_hf.models import BaseModel, load_base
from isoprune_hf.models.image_size import set_image_size
from isoprune_hf.models.processors import with_transform
from isoprune_hf.pruning.calibration.resumable import Repeatable, ResumableBatches
from isoprune_hf.pruning.scoring.scores import ImportanceScores
from isoprune_hf.recipes import DataRecipe, PruneRecipe
from isoprune_hf.tasks.registry import find_task

logger = get_logger(__name__)


@dataclass(frozen=True)
class Calibration:
    """This rank's micro-batches of the calibration sample, and the record of the sample for the plan.

    Without a setting that reads images there are no batches, and the record is empty.
    """

    batches: Repeatable | ResumableBatches | None = None
    sample: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Opened:
    """Inputs of a stage that scores or cuts.

    Attributes:
        prune: How to score and cut.
        data: How the images are read.
        images: Labelled images; None without `data.dataset`.
        base: The dense model on the accelerator's device, and its image processor.
        scores: Scores read from a file; None if the stage computes them.
        reader: Setting of the section `prune` that reads training images; None if none does.
        accelerator: The ranks.
    """

    prune: PruneRecipe
    data: DataRecipe
    images: ImageData | None
    base: BaseModel
    scores: ImportanceScores | None
    reader: str | None
    accelerator: Accelerator

    def open_calibration(self, output: str | Path | None = None) -> Calibration:
        """Open the calibration sample.

        Args:
            output: Result of the stage. Partial sums over the sample are kept next to it until `forget_scoring`, so
                that an interrupted scoring can resume; without it nothing is kept.
        """
        if self.reader is None or self.images is None:
            return Calibration()
        prune, data, ranks = self.prune, self.data, self.accelerator
        images = prune.calibration_batches * prune.batch_size
        train = calibration_split(self.images, images, prune.seed)
        ids = calibration_ids(
            len(train), batches=prune.calibration_batches, batch_size=prune.batch_size, seed=prune.seed
        )
        sample = _describe_sample(self.images, ids, prune, data)
        processor = with_transform(self.base.processor, interpolation=prune.interpolation)
        logger.info(f"score on {len(ids):,} images in micro-batches of {prune.batch_size}")
        drawn = CalibrationBatches(
            train,
            processor,
            LoaderOptions(prune.batch_size, data.num_workers, self.images.decoding),
            batches=prune.calibration_batches,
            seed=prune.seed,
            ranks=Ranks(ranks.process_index, ranks.num_processes),
        )
        batches = find_task(self.base.model.config).with_targets(drawn, self.base.model)
        if output is None:
            return Calibration(batches, sample)
        identity = {
            "sample": sample,
            "processor": processor.to_json_string(),
            "decoder": data.decoder,
            "rank": ranks.process_index,
            "world": ranks.num_processes,
            "batch_size": prune.batch_size,
        }
        folder = _scoring_folder(output, ranks)
        return Calibration(ResumableBatches(batches, folder, identity, prune.state_minutes), sample)


def open_data(data: DataRecipe, accelerator: Accelerator) -> ImageData:
    """Open the data set; one rank fills the cache that the others read."""
    with accelerator.main_process_first():
        return load_data(data)


def evaluation_split(images: ImageData, data: DataRecipe) -> Rows:
    """Return the split to evaluate on.

    Raises:
        DatasetError: There is none.
    """
    if images.evaluation is None:
        raise DatasetError(f"data: {images.name} has no split {data.eval_split!r} to evaluate on; set data.eval_split")
    split: Rows = images.evaluation
    return split


def evaluate_on(
    images: ImageData,
    model: IsoPruneForImageClassification,
    processor: BaseImageProcessor,
    data: DataRecipe,
    accelerator: Accelerator,
    *,
    dense: IsoPruneForImageClassification | None = None,
) -> dict[str, float | int | str]:
    """Evaluate a model, which moves to the accelerator's device, on the evaluation split of `images`.

    Args:
        images: The images.
        model: The model.
        processor: Makes its pixel values.
        data: How the images are read.
        accelerator: The ranks.
        dense: Its dense base on the device, for tasks that are measured against it.
    """
    figures = find_task(model.config).evaluate(
        move(model, accelerator.device),
        dense,
        evaluation_split(images, data),
        processor,
        LoaderOptions(data.batch_size, data.num_workers, images.decoding),
        accelerator=accelerator,
    )
    return images.with_provenance(figures)


def open_inputs(
    prune: PruneRecipe,
    data: DataRecipe,
    images: ImageData | None,
    accelerator: Accelerator,
    *,
    reader: str | None,
    scores: ImportanceScores | None = None,
) -> Opened:
    """Open the base model.

    Args:
        prune: The base, and how to score and cut it, settled if the stage scores or cuts.
        data: How the images are read.
        images: The opened data set, if there is one.
        accelerator: The ranks.
        reader: Setting that reads training images, see `Settled`; None if the stage neither scores nor repairs.
        scores: Known scores.

    Raises:
        RecipeError: No base is named, or its classes are those of images and there are none, or a setting is for
            classifiers and it is none.
        DatasetError: The labels of the images are not those of the base.
    """
    name = model_of(prune)
    if images is None and prune.num_labels == "data":
        raise RecipeError("prune.num_labels data needs data: set --data.dataset")
    base, images = _load_base(name, prune, images)
    _check_settings(prune, base)
    base.model.to(accelerator.device)
    base = with_data_transform(base, data)
    if prune.layout == "uniform":
        base = _with_stock_processor(base)
    return Opened(prune, data, images, base, scores, reader, accelerator)


def with_data_transform(base: BaseModel, data: DataRecipe) -> BaseModel:
    """Set the image size of the data section in the config of `base`, in place, and return it with its transform.

    Raises:
        RecipeError: The transform does not fit the processor, or the model does not take images of the size.
    """
    processor = with_transform(base.processor, **data.transform)
    if data.image_size is not None:
        set_image_size(base.model, processor)
    return base if processor is base.processor else BaseModel(base.model, processor)


def forget_scoring(output: str | Path, accelerator: Accelerator) -> None:
    """Remove the partial sums that this rank has kept next to `output`, which is complete now."""
    shutil.rmtree(_scoring_folder(output, accelerator), ignore_errors=True)


def _load_base(name: str, prune: PruneRecipe, images: ImageData | None) -> tuple[BaseModel, ImageData | None]:
    """Load the base, and number the images as it does; generic labels ("LABEL_0") become those of the data."""
    if images is None:
        num_labels = None if prune.num_labels == "data" else prune.num_labels
        base = load_base(
            name,
            prune.pretrained,
            model_args=prune.model_args,
            num_labels=num_labels,
            seed=prune.seed,
            weights=prune.weights,
            tasks=TASK_FORMS,
        )
        return base, None
    if prune.num_labels is not None:
        require_labels(images)
    names = images.label_names
    num_labels = len(names) if prune.num_labels == "data" else prune.num_labels
    base = load_base(
        name,
        prune.pretrained,
        model_args=prune.model_args,
        num_labels=num_labels,
        label_names=names if num_labels == len(names) else None,
        problem_type=images.problem_type,
        seed=prune.seed,
        weights=prune.weights,
        tasks=TASK_FORMS,
    )
    images = align_images(images, base.model)
    is_named = find_task(base.model.config).reads_labels
    if is_named and all(label == f"LABEL_{index}" for index, label in class_names(base.model).items()):
        base.model.config.id2label = dict(enumerate(names))
        base.model.config.label2id = {label: index for index, label in enumerate(names)}
    return base, images


def _check_settings(prune: PruneRecipe, base: BaseModel) -> None:
    """Check that settings for classifiers are given for one alone.

    Raises:
        RecipeError: The base is of another task.
    """
    task = find_task(base.model.config).form.task
    for name, value in (("layout", "uniform"), ("preset", "reference")):
        if getattr(prune, name) == value and task != IMAGE_CLASSIFICATION.task:
            raise RecipeError(
                f"prune.{name} {value} is for image classifiers, and {prune.model} is of the task {task}; leave it out"
            )


def _with_stock_processor(base: BaseModel) -> BaseModel:
    """Return the base with the image processor of its stock folder, so that all figures are of the same pixels.

    Raises:
        RecipeError: The images are neither grey nor RGB.
    """
    channels = channels_of(base.processor)
    if channels not in PILLOW_CHANNELS:
        raise RecipeError(
            f"prune.layout uniform: stock image processors resize grey and RGB images, the model reads {channels} "
            "channels; use prune.layout: per-layer"
        )
    processor = stock_processor(base.processor)
    if processor is not base.processor and getattr(processor, "do_center_crop", False):
        logger.info(
            "prune.layout uniform: the stock image processor crops images with an odd margin up to one pixel further "
            "left or up than the model's own; all figures are those of the stock one"
        )
    return BaseModel(base.model, processor)


def _describe_sample(images: ImageData, ids: list[int], prune: PruneRecipe, data: DataRecipe) -> dict[str, Any]:
    sample = {
        "dataset": images.fingerprint,
        "images": len(ids),
        "ids_sha256": hashlib.sha256(json.dumps(ids).encode()).hexdigest(),
        "ids": ids,
    }
    own = {} if prune.interpolation is None else {"interpolation": prune.interpolation}
    return sample | data.transform | own


def _scoring_folder(output: str | Path, accelerator: Accelerator) -> Path:
    return Path(output).parent / f".{Path(output).name}.scoring-{accelerator.process_index}"
