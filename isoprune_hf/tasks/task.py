"""`Task`: what every task implements."""

from pathlib import Path
from typing import Any, NamedTuple, Protocol

from accelerate import Accelerator
from transformers import BaseImageProcessor

from isoprune_hf.checkpoint.modeling_isoprune import IsoPruneForImageClassification
from isoprune_hf.checkpoint.task_forms import TaskForm
from isoprune_hf.data.columns import Annotation
from isoprune_hf.data.decoding import Rows
from isoprune_hf.data.loading import LoaderOptions
from isoprune_hf.evaluation.predictions import Figures
from isoprune_hf.pruning.calibration.resumable import Repeatable


class Answer(NamedTuple):
    """The lines of Python that show the answer of a network: `NAME = model(...)END`, and then `SHOWN`."""

    name: str
    end: str
    shown: str


class Wording(NamedTuple):
    """The words of a card for a task.

    Args:
        verb: What its pipeline does, as the name of a variable.
        output: What a network returns; the number and the names of classes stand around it, if there are any.
        measured: What its figures measure.
        quality: What they measure, in short.
        answer: How its answer is shown.
    """

    verb: str
    output: str
    measured: str
    quality: str
    answer: Answer


class Task(Protocol):
    """A task of a network.

    Attributes:
        form: Its name, and how a folder of it opens.
        reads_labels: Networks are scored, trained and measured by labels. Without them any images will do, and the
            dense network is the teacher.
        annotations: Columns beside the images that it uses, where `data.label_column` names one.
        figures: Names of its figures in the order of a table; the largest value of the first one is the best.
        wording: How a card speaks of it.
    """

    @property
    def form(self) -> TaskForm: ...

    @property
    def reads_labels(self) -> bool: ...

    @property
    def annotations(self) -> tuple[Annotation, ...]: ...

    @property
    def figures(self) -> tuple[str, ...]: ...

    @property
    def wording(self) -> Wording: ...

    def with_targets(self, batches: Repeatable, model: IsoPruneForImageClassification) -> Repeatable:
        """Return micro-batches of images and labels with the targets of the loss in place of the labels."""

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
        """Measure a model on its device.

        Args:
            model: The model.
            dense: The dense network on the same device; None if the model is the dense one, or it is not known.
            split: Images with the columns `image` and `label`.
            processor: Makes the pixel values.
            options: How the images are loaded.
            accelerator: The ranks that share the work.

        Raises:
            DatasetError: Images cannot be read, or the labels do not fit.
        """

    def code(self, folder: Path) -> str:
        """Return the line of Python that makes the pipeline of a folder."""

    def try_pipeline(self, folder: Path, image: Any, truth: str | None) -> str:
        """Open a folder by the pipeline of transformers, and describe its answer for one image in a line.

        Args:
            folder: The folder.
            image: An image, or an array (C, H, W).
            truth: Name of its class, if it has one.
        """
