"""How a model is measured between the epochs of its training: `Judging`, that of classifiers in `CLASSES`."""

from dataclasses import dataclass
from typing import Protocol

from accelerate import Accelerator
from torch import nn
from transformers import BaseImageProcessor

from isoprune_hf.data.dataset import ImageData
from isoprune_hf.data.decoding import Rows
from isoprune_hf.data.loading import LoaderOptions
from isoprune_hf.evaluation.evaluate import compute_figures, predict_split
from isoprune_hf.evaluation.predictions import Figures


class Evaluate(Protocol):
    """Measures a model on its device, on all ranks alike."""

    def __call__(
        self,
        model: nn.Module,
        split: Rows,
        processor: BaseImageProcessor,
        options: LoaderOptions,
        *,
        accelerator: Accelerator | None,
    ) -> Figures: ...


@dataclass(frozen=True, eq=False)
class Judging:
    """How a model is measured, and which figure chooses the best epoch.

    Args:
        evaluate: Returns the figures of a model.
        best: Name of the figure whose largest value is the best one.
    """

    evaluate: Evaluate
    best: str


def _evaluate_classes(
    model: nn.Module,
    split: Rows,
    processor: BaseImageProcessor,
    options: LoaderOptions,
    *,
    accelerator: Accelerator | None,
) -> Figures:
    return compute_figures(predict_split(model, split, processor, options, accelerator=accelerator))


CLASSES = Judging(_evaluate_classes, "top1")
_LISTS = Judging(_evaluate_classes, "map")


def judging_of(data: ImageData) -> Judging:
    """Return how a classifier of some images is measured: by the class of each, or by its list of classes."""
    return _LISTS if data.is_multi_label else CLASSES
