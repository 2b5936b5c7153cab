"""Metrics of an image classifier for the `evaluate` library: over all images, and for each class."""

import csv
import io
from collections.abc import Sequence
from pathlib import Path

import evaluate
import numpy as np

from isoprune_hf.data.dataset import prediction_features

TOP = 5  # classes per image in `predictions`
BINS = 15
_FIRST_COLUMNS = ("class", "name")
_INPUTS = (
    "predictions: ids of the top classes, best first; references: labels; losses: loss of each image; confidences: "
    "probability of the top class."
)


class ImageClassificationMetric(evaluate.Metric):  # type: ignore[misc]  # evaluate is untyped
    """Top-1 and top-5 accuracy (fractions), mean loss, expected calibration error and number of images."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description="Accuracy, mean loss and expected calibration error of an image classifier.",
            citation="",
            inputs_description=_INPUTS,
            features=prediction_features(),
        )

    def _compute(
        self,
        predictions: list[list[int]],
        references: list[int],
        losses: list[float],
        confidences: list[float],
    ) -> dict[str, float | int]:
        hits = np.asarray(predictions) == np.asarray(references)[:, None]
        return {
            "top1": float(hits[:, 0].mean()),
            "top5": float(hits[:, :TOP].any(axis=1).mean()),
            "loss": float(np.mean(losses)),
            "ece": calibration_error(np.asarray(confidences), hits[:, 0]),
            "images": len(references),
        }


class PerClassMetric(evaluate.Metric):  # type: ignore[misc]  # evaluate is untyped
    """Number of images, accuracy, mean loss, mean confidence and number of predictions; lists by class id."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description="Accuracy, mean loss and mean confidence of an image classifier for each class.",
            citation="",
            inputs_description=f"{_INPUTS} num_classes: number of classes.",
            features=prediction_features(),
        )

    def _compute(
        self,
        predictions: list[list[int]],
        references: list[int],
        losses: list[float],
        confidences: list[float],
        num_classes: int,
    ) -> dict[str, list[float | int]]:
        labels = np.asarray(references)
        tops = np.asarray(predictions)
        hits = tops == labels[:, None]
        images = np.bincount(labels, minlength=num_classes)

        def mean(values: np.ndarray) -> list[float]:
            sums = np.bincount(labels, weights=values, minlength=num_classes)
            means: list[float] = np.divide(sums, images, out=np.full(num_classes, np.nan), where=images > 0).tolist()
            return means

        return {
            "images": images.tolist(),
            "top1": mean(hits[:, 0]),
            "top5": mean(hits[:, :TOP].any(axis=1)),
            "loss": mean(np.asarray(losses)),
            "confidence": mean(np.asarray(confidences)),
            "predicted": np.bincount(tops[:, 0], minlength=num_classes).tolist(),
        }


def calibration_error(confidences: np.ndarray, hits: np.ndarray) -> float:
    """Compute the expected calibration error over 15 bins of equal width.

    Args:
        confidences: Probabilities of the top class, of shape (N,).
        hits: Whether the top class is the label, of shape (N,).

    Returns:
        Mean absolute difference of confidence and accuracy over the bins, weighted by their images; from 0 to 1.

    Source:
        Guo et al., On calibration of modern neural networks, ICML 2017 (arXiv 1706.04599), eq. 3, after Naeini et al.,
        AAAI 2015; bin m holds the confidences in ((m - 1) / M, m / M].
    """
    bins = np.clip(np.ceil(confidences * BINS).astype(int) - 1, 0, BINS - 1)
    gaps = np.bincount(bins, weights=hits - confidences, minlength=BINS)
    return float(np.abs(gaps).sum() / len(confidences))


def per_class_table(figures: dict[str, list[float | int]], label_names: Sequence[str]) -> str:
    """Return the figures of `PerClassMetric` as CSV; undefined figures of a class without images are empty."""
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    table.writerow([*_FIRST_COLUMNS, *figures])
    for number, name in enumerate(label_names):
        values = [column[number] for column in figures.values()]
        table.writerow([number, name, *("" if value != value else value for value in values)])
    return text.getvalue()


def is_per_class_table(file: str | Path) -> bool:
    """Return whether a file is empty or a table of `per_class_table`, by its first signs."""
    if not Path(file).is_file():
        return False
    head = (",".join(_FIRST_COLUMNS) + ",").encode()
    with open(file, "rb") as content:
        return content.read(len(head)) in (b"", head)
