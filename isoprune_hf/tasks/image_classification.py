"""Image classification: scored by the labels, measured by accuracy, loss and calibration error."""

from pathlib import Path
from typing import Any

from accelerate import Accelerator
from transformers import BaseImageProcessor, pipeline

from isoprune_hf.checkpoint import task_forms
from isoprune_hf.checkpoint.modeling_isoprune import IsoPruneForImageClassification
from isoprune_hf.data.decoding import Rows
from isoprune_hf.data.labels import IMAGE_CLASSES
from isoprune_hf.data.loading import LoaderOptions
from isoprune_hf.evaluation.evaluate import evaluate_model
from isoprune_hf.evaluation.predictions import Figures
from isoprune_hf.pruning.calibration.resumable import Repeatable
from isoprune_hf.tasks.task import Answer, Wording


class ImageClassification:
    """See `Task`."""

    form = task_forms.IMAGE_CLASSIFICATION
    reads_labels = True
    annotations = IMAGE_CLASSES
    figures: tuple[str, ...] = ("top1", "top5", "loss", "ece")
    wording = Wording(
        verb="classify",
        output="classes",
        measured="Accuracy and loss",
        quality="Accuracy",
        answer=Answer("logits", ".logits", "print(model.config.id2label[logits.argmax(-1).item()])"),
    )

    def with_targets(self, batches: Repeatable, model: IsoPruneForImageClassification) -> Repeatable:
        """Return the batches themselves: the targets are the labels."""
        return batches

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
        """Compute the figures of `evaluate_model`."""
        return evaluate_model(
            model,
            split,
            processor,
            accelerator=accelerator,
            batch_size=options.batch_size,
            num_workers=options.num_workers,
            decoding=options.decoding,
        )

    def code(self, folder: Path) -> str:
        """Return the line of Python that makes the pipeline of a folder."""
        return f'classify = pipeline("image-classification", model="{folder}")'

    def try_pipeline(self, folder: Path, image: Any, truth: str | None) -> str:
        """Classify the image."""
        best = pipeline("image-classification", model=str(folder))(image)[0]
        return f"pipeline on a held-out image: {best['label']} ({best['score']:.2f}), truth {truth}"


IMAGE_CLASSIFICATION = ImageClassification()
