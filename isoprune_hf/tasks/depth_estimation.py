"""Depth estimation: scored without labels, measured by the depths of the dense network."""

from pathlib import Path
from typing import Any

from accelerate import Accelerator
from transformers import BaseImageProcessor, pipeline

from isoprune_hf.checkpoint import task_forms
from isoprune_hf.checkpoint.modeling_isoprune import IsoPruneForImageClassification
from isoprune_hf.data.decoding import Rows
from isoprune_hf.data.loading import LoaderOptions
from isoprune_hf.evaluation.comparing import compare_outputs
from isoprune_hf.evaluation.depth import DEPTH_MEASURES
from isoprune_hf.evaluation.predictions import Figures
from isoprune_hf.models.drawn_targets import draw_for, held
from isoprune_hf.pruning.calibration.resumable import Repeatable
from isoprune_hf.tasks.task import Answer, Wording


class DepthEstimation:
    """See `Task`."""

    form = task_forms.DEPTH_ESTIMATION
    reads_labels = False
    figures = ("delta1", "depth_difference")
    wording = Wording(
        verb="estimate",
        output="the depth of every pixel",
        measured="Share of the pixels whose depth is less than 1.25 times off that of the base, and mean difference "
        "of the depths relative to their mean",
        quality="The likeness of the depths",
        answer=Answer("outputs", "", "print(outputs.predicted_depth.shape)"),
    )

    def with_targets(self, batches: Repeatable, model: IsoPruneForImageClassification) -> Repeatable:
        """Return the batches with random signs of the depths, see `FeatureLoss`."""
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
        """Compute the figures of `DEPTH_MEASURES`."""
        return compare_outputs(held(model), dense, split, processor, options, DEPTH_MEASURES, accelerator=accelerator)

    def code(self, folder: Path) -> str:
        """Return the line of Python that makes the pipeline of a folder."""
        return f'estimate = pipeline("depth-estimation", model="{folder}")'

    def try_pipeline(self, folder: Path, image: Any, truth: str | None) -> str:
        """Estimate the depths of the image."""
        found = pipeline("depth-estimation", model=str(folder))(image)["predicted_depth"]
        return f"pipeline on a held-out image: depths of the shape {list(found.shape)}"


DEPTH_ESTIMATION = DepthEstimation()
