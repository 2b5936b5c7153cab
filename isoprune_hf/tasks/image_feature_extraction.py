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
from isoprune_hf.errors import CheckpointError
from isoprune_hf.evaluation.features import evaluate_features
from isoprune_hf.evaluation.predictions import Figures
from isoprune_hf.models.feature_loss import SignBatches
from isoprune_hf.models.held import HeldModel, output_shapes
from isoprune_hf.pruning.calibration.resumable import Repeatable


class ImageFeatureExtraction:
    """See `Task`."""

    form = task_forms.IMAGE_FEATURE_EXTRACTION
    reads_labels = False
    figures = ("cosine", "position_cosine", "knn")

    def with_targets(self, batches: Repeatable, model: IsoPruneForImageClassification) -> Repeatable:
        """Return the batches with random signs of the features, see `FeatureLoss`."""
        return SignBatches(batches, [torch.Size(shape) for shape in output_shapes(_held(model))])

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
        return evaluate_features(_held(model), dense, split, processor, options, accelerator=accelerator)

    def code(self, folder: Path) -> str:
        """Return the line of Python that makes the pipeline of a folder."""
        return f'extract = pipeline("image-feature-extraction", model="{folder}")'

    def try_pipeline(self, folder: Path, image: Any, truth: str | None) -> str:
        """Extract the features of the image."""
        found = torch.tensor(pipeline("image-feature-extraction", model=str(folder))(image))
        return f"pipeline on a held-out image: features of the shape {list(found.shape)}"


def _held(model: IsoPruneForImageClassification) -> HeldModel:
    """Return the model, as `load_base` opens a network of features."""
    if not isinstance(model, HeldModel):
        raise CheckpointError(f"{type(model).__name__} is not held with a loss; open the folder with load_base")
    return model


IMAGE_FEATURE_EXTRACTION = ImageFeatureExtraction()
