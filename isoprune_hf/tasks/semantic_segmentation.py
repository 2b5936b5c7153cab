"""Semantic segmentation: scored without labels, measured by masks and by the dense network."""

from pathlib import Path
from typing import Any

from accelerate import Accelerator
from transformers import BaseImageProcessor, pipeline

from isoprune_hf.checkpoint import task_forms
from isoprune_hf.checkpoint.modeling_isoprune import IsoPruneForImageClassification
from isoprune_hf.data.decoding import Rows
from isoprune_hf.data.loading import LoaderOptions
from isoprune_hf.evaluation.predictions import Figures
from isoprune_hf.evaluation.segmentation import evaluate_pixels
from isoprune_hf.models.drawn_targets import draw_for, held
from isoprune_hf.pruning.calibration.resumable import Repeatable
from isoprune_hf.tasks.task import Answer, Wording


class SemanticSegmentation:
    """See `Task`."""

    form = task_forms.SEMANTIC_SEGMENTATION
    reads_labels = False
    figures = ("same_class", "pixel_divergence", "miou", "pixel_accuracy")
    wording = Wording(
        verb="segment",
        output="classes, of which every pixel has one",
        measured="Mean IoU of the classes and share of right pixels, where there are masks; share of the pixels whose "
        "class is that of the base, and divergence of their probabilities from it",
        quality="The likeness of the classes of pixels",
        answer=Answer("outputs", "", "print(processor.post_process_semantic_segmentation(outputs)[0])"),
    )

    def with_targets(self, batches: Repeatable, model: IsoPruneForImageClassification) -> Repeatable:
        """Return the batches with random numbers that draw the class of each pixel, see `PixelClassLoss`."""
        return draw_for(batches, held(model))

    def evaluate(
        self,
        model: IsoPruneForImageClassification,
        dense: IsoPruneForImageClassification | None,
        split: Rows,
        processor: BaseImageProcessor,
        options: LoaderOptions,
        *,
        accelerator: Accelerator | None = None,
    ) -> Figures:
        """Compute the figures of `evaluate_pixels`."""
        return evaluate_pixels(held(model), dense, split, processor, options, accelerator=accelerator)

    def code(self, folder: Path) -> str:
        """Return the line of Python that makes the pipeline of a folder."""
        return f'segment = pipeline("image-segmentation", model="{folder}")'

    def try_pipeline(self, folder: Path, image: Any, truth: str | None) -> str:
        """Segment the image."""
        found = [part["label"] for part in pipeline("image-segmentation", model=str(folder))(image)]
        return f"pipeline on a held-out image: {', '.join(found)}"


SEMANTIC_SEGMENTATION = SemanticSegmentation()
