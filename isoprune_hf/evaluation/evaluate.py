"""Evaluate an image classifier on a split: call `evaluate_model`, or `predict_split` for its predictions."""

import logging
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import NamedTuple

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor, nn
from transformers import BaseImageProcessor, PreTrainedModel

from isoprune_hf.data.decoding import Decoding, Rows, check_broken
from isoprune_hf.data.labels import align_split, check_problem
from isoprune_hf.data.loading import ALONE, ImageBatch, LoaderOptions, Ranks, eval_loader
from isoprune_hf.data.pixels import normalised
from isoprune_hf.errors import DatasetError
from isoprune_hf.evaluation.metrics import TOP, ImageClassificationMetric, PerClassMetric, per_class_table
from isoprune_hf.models.layout import in_fast_layout
from isoprune_hf.terminal import with_progress

logger = logging.getLogger(__name__)  # not accelerate's, which needs an accelerator

Figures = dict[str, float | int]


class Predictions(NamedTuple):
    """Predictions of a model for the N images of a split, the same on every rank.

    Args:
        predictions: Ids of the top classes, best first, of shape (N, 5); -1 if the model has fewer classes.
        references: Labels of shape (N,).
        losses: Cross-entropies of shape (N,) in float64.
        confidences: Probabilities of the top class, of shape (N,) in float64.
        broken: Number of images that could not be read; they are left out, or grey.
    """

    predictions: np.ndarray
    references: np.ndarray
    losses: np.ndarray
    confidences: np.ndarray
    broken: int

    @property
    def columns(self) -> dict[str, np.ndarray]:
        """Columns that the metrics take."""
        return {name: column for name, column in self._asdict().items() if name != "broken"}


def evaluate_model(
    model: nn.Module,
    split: Rows,
    processor: BaseImageProcessor,
    *,
    accelerator: Accelerator | None = None,
    batch_size: int = 64,
    num_workers: int | None = 0,
    decoding: Decoding | None = None,
) -> Figures:
    """Evaluate an image classifier on its current device.

    Args:
        model: Returns `.logits` of shape (B, C) for `pixel_values`.
        split: Images with the columns `image` and `label`.
        processor: Makes the pixel values.
        accelerator: The ranks that share the work; one process by default. All ranks must call this with the same
            split.
        batch_size: Images in a batch on each rank.
        num_workers: Loader processes on each rank; None chooses them.
        decoding: How images are read; by default, an image that cannot be read is an error.

    Returns:
        `top1` and `top5` as fractions, `loss` (mean cross-entropy in float64), `ece` (expected calibration error over
        15 bins, a fraction) and `images`; the same on every rank. If images could not be read, `broken` is their
        number.

    Raises:
        DatasetError: An image cannot be read, or more images than the policy allows, or the model does not choose one
            of several classes, or has other classes.
    """
    if isinstance(model, PreTrainedModel):
        check_problem(model.config)
        split = align_split(split, model.config)
    options = LoaderOptions(batch_size, num_workers, decoding or Decoding())
    return compute_figures(predict_split(model, split, processor, options, accelerator=accelerator))


def compute_figures(predictions: Predictions) -> Figures:
    """Compute the figures that `evaluate_model` returns."""
    figures: Figures = ImageClassificationMetric(keep_in_memory=True).compute(**predictions.columns)
    return figures | ({"broken": predictions.broken} if predictions.broken else {})


def tabulate_classes(predictions: Predictions, label_names: Sequence[str]) -> str:
    """Return CSV with images, top1, top5, loss, mean confidence and number of predictions of each class."""
    metric = PerClassMetric(keep_in_memory=True)
    return per_class_table(metric.compute(**predictions.columns, num_classes=len(label_names)), label_names)


def predict_split(
    model: nn.Module,
    split: Rows,
    processor: BaseImageProcessor,
    options: LoaderOptions,
    *,
    accelerator: Accelerator | None = None,
) -> Predictions:
    """Predict the class of every image of a split, on the current device of the model.

    Rank r predicts the images r, r + world, ... and writes the results into vectors as long as the split, which are
    summed over the ranks. Every image therefore counts once for any number of ranks, also if some ranks have no image.
    All ranks must call this with the same split.

    Args:
        model: Returns `.logits` of shape (B, C) for `pixel_values`; may be wrapped by the accelerator.
        split: Images with the columns `image` and `label`.
        processor: Makes the pixel values.
        options: How the images are loaded.
        accelerator: The ranks that share the work; one process by default.

    Raises:
        DatasetError: An image cannot be read, or more images than the policy allows.
    """
    ranks = ALONE if accelerator is None else Ranks(accelerator.process_index, accelerator.num_processes)
    model = model if accelerator is None else accelerator.unwrap_model(model)
    decoding = options.decoding
    loader = eval_loader(split, processor, options, ranks)
    batches = with_progress(loader, "evaluate", "batch", rank=ranks.rank)
    tensors = _predict_shard(model, processor, batches, len(split))
    if accelerator is not None and ranks.world > 1:
        # Each place was written by one rank, so the sum is a union.
        tensors = [accelerator.reduce(tensor.to(accelerator.device), reduction="sum").cpu() for tensor in tensors]
    top, references, losses, confidences, broken = (tensor.numpy() for tensor in tensors)
    places = np.flatnonzero(broken)
    if ranks.rank == 0:
        for place in places[: decoding.max_broken].tolist():
            treatment = "left out" if decoding.broken == "skip" else "grey"
            logger.warning(f"evaluation: {loader.images.describe(place)}: {treatment}")
    check_broken(len(places), decoding, "the evaluation")
    if decoding.broken == "skip":
        top, references, losses, confidences = (
            np.delete(vector, places, axis=0) for vector in (top, references, losses, confidences)
        )
    if not len(top):
        raise DatasetError("data: the evaluation split has no readable image; fix its files, or set data.eval_split")
    return Predictions(top, references, losses, confidences, broken=len(places))


@torch.no_grad()
def _predict_shard(
    model: nn.Module, processor: BaseImageProcessor, batches: Iterable[ImageBatch], images: int
) -> list[Tensor]:
    """Return the vectors of `Predictions`, zero for images of other ranks, and a 1 for each broken image (N,)."""
    device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
    top = torch.zeros(images, TOP, dtype=torch.int64)
    references = torch.zeros(images, dtype=torch.int64)
    losses = torch.zeros(images, dtype=torch.float64)
    confidences = torch.zeros(images, dtype=torch.float64)
    broken = torch.zeros(images, dtype=torch.int64)
    with eval_mode(model), ExitStack() as layout:
        for number, (positions, pixels, labels, is_replacement) in enumerate(batches):
            pixel_values = normalised(pixels.to(device, non_blocking=True), processor)
            if number == 0:
                layout.enter_context(in_fast_layout(model, pixel_values))
            logits = model(pixel_values=pixel_values).logits.cpu().double()
            best = logits.topk(min(TOP, logits.shape[1]), dim=1).indices
            top[positions] = nn.functional.pad(best, (0, TOP - best.shape[1]), value=-1)
            references[positions] = labels
            losses[positions] = nn.functional.cross_entropy(logits, labels, reduction="none")
            confidences[positions] = logits.softmax(dim=1).amax(dim=1)
            broken[positions] = is_replacement.long()
    return [top, references, losses, confidences, broken]


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Set the model to eval mode inside the block, and restore the mode of each of its modules after it."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training
