"""How a model is measured between the epochs of its training: `Judging`, that of classifiers in `CLASSES`."""

from dataclasses import dataclass
from typing import Protocol

from accelerate import Accelerator
from torch import nn
from transformers import BaseImageProcessor

from isoprune_hf.data.decoding import Rows
from isoprune_hf.data.loading import LoaderOptions
from isoprune_hf.evaluation.evaluate import Figures, compute_figures, predict_split


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
