"""Collect the predictions of a classifier for a split and compute their figures: `predictions_of` chooses the kind."""

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple, Protocol, Self, TypeAlias

import numpy as np
import torch
from torch import Tensor, nn

from isoprune_hf.data.decoding import Rows
from isoprune_hf.data.label_columns import is_multi_label
from isoprune_hf.errors import DatasetError
from isoprune_hf.evaluation.average_precision import average_precisions
from isoprune_hf.evaluation.metrics import TOP, ImageClassificationMetric, PerClassMetric, per_class_table

Figures = dict[str, float | int]


class Predictions(Protocol):
    """Predictions of a model for the N images of a split, the same on every rank.

    Attributes:
        broken: Number of images that could not be read; they are left out, or grey.
    """

    @property
    def broken(self) -> int: ...

    @property
    def figures(self) -> Figures:
        """Figures over all images."""

    def table(self, label_names: Sequence[str]) -> str:
        """Return CSV with the figures of each class."""

    def agreement(self, other: Self) -> float:
        """Return the share of the answers that two models have in common, from 0 to 1."""


class ClassPredictions(NamedTuple):
    """Predictions of one class for each image.

    Args:
        predictions: Ids of the top classes, best first, of shape (N, 5); -1 if the model has fewer classes.
        references: Labels of shape (N,).
        losses: Cross-entropies of shape (N,) in float64.
        confidences: Probabilities of the top class, of shape (N,) in float64.
        broken: See `Predictions`.
    """

    predictions: np.ndarray
    references: np.ndarray
    losses: np.ndarray
    confidences: np.ndarray
    broken: int

    @staticmethod
    def blank(images: int, classes: int) -> list[Tensor]:
        """Return the first four fields for so many images, filled with zeros."""
        whole, real = (partial(torch.zeros, dtype=kind) for kind in (torch.int64, torch.float64))
        return [whole(images, TOP), whole(images), real(images), real(images)]

    @staticmethod
    def record(logits: Tensor, labels: Tensor) -> list[Tensor]:
        """Return the first four fields of B images, for logits (B, C) in float64 and labels (B,)."""
        best = logits.topk(min(TOP, logits.shape[1]), dim=1).indices
        return [
            nn.functional.pad(best, (0, TOP - best.shape[1]), value=-1),
            labels,
            nn.functional.cross_entropy(logits, labels, reduction="none"),
            logits.softmax(dim=1).amax(dim=1),
        ]

    @property
    def columns(self) -> dict[str, np.ndarray]:
        """Columns that the metrics take."""
        return {name: column for name, column in self._asdict().items() if name != "broken"}

    @property
    def figures(self) -> Figures:
        """Accuracy, loss, calibration error and number of images."""
        figures: Figures = ImageClassificationMetric(keep_in_memory=True).compute(**self.columns)
        return figures

    def table(self, label_names: Sequence[str]) -> str:
        """Return CSV with images, top1, top5, loss, mean confidence and number of predictions of each class."""
        metric = PerClassMetric(keep_in_memory=True)
        return per_class_table(metric.compute(**self.columns, num_classes=len(label_names)), label_names)

    def agreement(self, other: Self) -> float:
        """Return the share of the images with the same top class."""
        return float(np.mean(self.predictions[:, 0] == other.predictions[:, 0]))


class LabelPredictions(NamedTuple):
    """Predictions of any number of labels for each image.

    Args:
        scores: Logits of shape (N, C) in float32.
        references: Zeros and ones of shape (N, C) in uint8.
        losses: Binary cross-entropies, means over the classes, of shape (N,) in float64.
        broken: See `Predictions`.
    """

    scores: np.ndarray
    references: np.ndarray
    losses: np.ndarray
    broken: int

    @staticmethod
    def blank(images: int, classes: int) -> list[Tensor]:
        """Return the first three fields for so many images, filled with zeros."""
        scores, references = (torch.zeros(images, classes, dtype=kind) for kind in (torch.float32, torch.uint8))
        return [scores, references, torch.zeros(images, dtype=torch.float64)]

    @staticmethod
    def record(logits: Tensor, labels: Tensor) -> list[Tensor]:
        """Return the first three fields of B images, for logits (B, C) in float64 and targets (B, C).

        Raises:
            DatasetError: The model has another number of outputs.
        """
        if logits.shape != labels.shape:
            raise DatasetError(
                f"data: the labels are lists of {labels.shape[1]} classes, and the model has {logits.shape[1]} outputs"
            )
        losses = nn.functional.binary_cross_entropy_with_logits(logits, labels.double(), reduction="none")
        return [logits.float(), labels.to(torch.uint8), losses.mean(dim=1)]

    @property
    def figures(self) -> Figures:
        """Mean average precision over the classes of at least one image, mean loss and number of images."""
        precisions = average_precisions(self.scores, self.references)
        known = precisions[~np.isnan(precisions)]
        precision: Figures = {"map": float(known.mean())} if len(known) else {}
        return {**precision, "loss": float(self.losses.mean()), "images": len(self.losses)}

    def table(self, label_names: Sequence[str]) -> str:
        """Return CSV with images, average precision and number of predictions (above 1/2) of each class."""
        columns = {
            "images": self.references.sum(axis=0, dtype=int).tolist(),
            "average_precision": average_precisions(self.scores, self.references).tolist(),
            "predicted": (self.scores > 0).sum(axis=0).tolist(),
        }
        return per_class_table(columns, label_names)

    def agreement(self, other: Self) -> float:
        """Return the share of the labels of all images on which both models decide alike, at probability 1/2."""
        return float(np.mean((self.scores > 0) == (other.scores > 0)))


Kind: TypeAlias = type[ClassPredictions] | type[LabelPredictions]


def predictions_of(split: Rows) -> Kind:
    """Return the kind of predictions that is compared with the labels of a split."""
    return LabelPredictions if is_multi_label(split) else ClassPredictions
