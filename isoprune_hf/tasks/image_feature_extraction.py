"""Image feature extraction: scored without labels, measured by the features of the dense network."""

from pathlib import Path

import torch
from accelerate import Accelerator
from transformers import BaseImageProcessor

from isoprune_hf.checkpoint import task_forms
from isoprune_hf.checkpoint.modeling_isoprune import IsoPruneForImageClassification
from isoprune_hf.data.decoding import Rows
from isoprune_hf.data.loading import LoaderOptions
from isoprune_hf.errors import CheckpointError
from isoprune_hf.evaluation.evaluate import Figures
from isoprune_hf.evaluation.features import evaluate_features
from isoprune_hf.models.feature_loss import SignBatches
from isoprune_hf.models.held import HeldModel
from isoprune_hf.pruning.calibration.resumable import Repeatable


class ImageFeatureExtraction:
    """See `Task`."""

    form = task_forms.IMAGE_FEATURE_EXTRACTION

    def with_targets(self, batches: Repeatable, model: IsoPruneForImageClassification) -> Repeatable:
        """Return the batches with random signs of the features, see `FeatureLoss`."""
        with torch.no_grad():
            blank = torch.zeros(1, *(model.config.image_size or ()), device=model.device)
            outputs = _held(model)(pixel_values=blank).outputs or ()
        return SignBatches(batches, [value.shape[1:] for value in outputs])

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


def _held(model: IsoPruneForImageClassification) -> HeldModel:
    """Return the model, as `load_base` opens a network of features."""
    if not isinstance(model, HeldModel):
        raise CheckpointError(f"{type(model).__name__} is not held with a loss; open the folder with load_base")
    return model


IMAGE_FEATURE_EXTRACTION = ImageFeatureExtraction()
