"""A task that reads no labels: `LabelFree`, of which a task gives what differs."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Protocol

from accelerate import Accelerator
from torch import nn
from transformers import BaseImageProcessor, pipeline

from isoprune_hf.checkpoint.modeling_isoprune import IsoPruneForImageClassification
from isoprune_hf.checkpoint.task_forms import TaskForm
from isoprune_hf.data.columns import Annotation
from isoprune_hf.data.decoding import Rows
from isoprune_hf.data.loading import LoaderOptions
from isoprune_hf.evaluation.predictions import Figures
from isoprune_hf.models.drawn_targets import draw_for, held
from isoprune_hf.models.held import HeldModel
from isoprune_hf.pruning.calibration.resumable import Repeatable
from isoprune_hf.tasks.task import Wording


class Compare(Protocol):
    """Computes the figures of a network and its dense base on a split, see `Task.evaluate`."""

    def __call__(
        self,
        model: HeldModel,
        dense: nn.Module | None,
        split: Rows,
        processor: BaseImageProcessor,
        options: LoaderOptions,
        *,
        accelerator: Accelerator | None = None,
    ) -> Figures: ...


@dataclass(frozen=True)
class LabelFree:
    """A task whose networks are scored and trained with the outputs of the dense network; see `Task`.

    Args:
        form: As in `Task`.
        annotations: As in `Task`.
        figures: As in `Task`.
        wording: As in `Task`.
        compare: Computes the figures.
        ask: Asks the pipeline of a folder about an image, and returns the answer in words.
    """

    form: TaskForm
    annotations: tuple[Annotation, ...]
    figures: tuple[str, ...]
    wording: Wording
    compare: Compare
    ask: Callable[[Any, Any], str]
    reads_labels: ClassVar[bool] = False

    def with_targets(self, batches: Repeatable, model: IsoPruneForImageClassification) -> Repeatable:
        """Return the batches with drawn targets for the loss of the network's outputs, see `loss_without_labels`."""
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
        """Compute the figures."""
        return self.compare(held(model), dense, split, processor, options, accelerator=accelerator)

    def code(self, folder: Path) -> str:
        """Return the line of Python that makes the pipeline of a folder."""
        return f'{self.wording.verb} = pipeline("{self.form.pipeline}", model="{folder}")'

    def try_pipeline(self, folder: Path, image: Any, truth: str | None) -> str:
        """Ask the pipeline about the image."""
        made: Any = pipeline(self.form.pipeline, model=str(folder))  # type: ignore[call-overload]  # a name is any of them
        return f"pipeline on a held-out image: {self.ask(made, image)}"
