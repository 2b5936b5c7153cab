"""Image feature extraction: scored without labels, measured by the features of the dense network."""

from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from transformers import BaseImageProcessor, pipeline

from isoprune_hf.checkpoint import task_forms
from isoprune_hf.checkpoint.modeling_isoprune import IsoPruneForImageClassification
from isoprune_hf.data.decoding import Rows
from isoprune_hf.data.loading import LoaderOptions
from isoprune_hf.evaluation.features import evaluate_features
from isoprune_hf.evaluation.predictions import Figures
from isoprune_hf.models.drawn_targets import draw_for, held
from isoprune_hf.pruning.calibration.resumable import Repeatable
from isoprune_hf.tasks.task import Answer, Wording


class ImageFeatureExtraction:
    """See `Task`."""

    form = task_forms.IMAGE_FEATURE_EXTRACTION
    reads_labels = False
    figures = ("cosine", "position_cosine", "knn")
    wording = Wording(
        verb="extract",
        output="features, as wide as those of the base (image-feature-extraction)",
        measured="Cosine similarity of the features with those of the base (pooled, and at every position), and class "
        "by the 20 nearest other images (k-NN)",
        quality="The likeness of the features",
        answer=Answer("outputs", "", "print(outputs.last_hidden_state.shape)"),
    )

    def with_targets(self, batches: Repeatable, model: IsoPruneForImageClassification) -> Repeatable:
        """Return the batches with random signs of the features, see `FeatureLoss`."""
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
        """Compute the figures of `evaluate_features`."""
        return evaluate_features(held(model), dense, split, processor, options, accelerator=accelerator)

    def code(self, folder: Path) -> str:
        """Return the line of Python that makes the pipeline of a folder."""
        return f'extract = pipeline("image-feature-extraction", model="{folder}")'

    def try_pipeline(self, folder: Path, image: Any, truth: str | None) -> str:
        """Extract the features of the image."""
        found = torch.tensor(pipeline("image-feature-extraction", model=str(folder))(image))
        return f"pipeline on a held-out image: features of the shape {list(found.shape)}"


IMAGE_FEATURE_EXTRACTION = ImageFeatureExtraction()
