"""Evaluate an image classifier on a split: call `evaluate_model`, or `predict_split` for its predictions."""

import logging
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor, nn
from transformers import BaseImageProcessor, PreTrainedModel

from isoprune_hf.data.decoding import Decoding, Rows, check_broken
from isoprune_hf.data.label_columns import class_count, is_multi_label
from isoprune_hf.data.labels import align_split, check_problem
from isoprune_hf.data.loading import ALONE, ImageBatch, LoaderOptions, Ranks, eval_loader
from isoprune_hf.data.pixels import normalised
from isoprune_hf.errors import DatasetError
from isoprune_hf.evaluation.predictions import Figures, Kind, Predictions, predictions_of
from isoprune_hf.models.layout import in_fast_layout
from isoprune_hf.terminal import with_progress

logger = logging.getLogger(__name__)  # not accelerate's, which needs an accelerator


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
        15 bins, a fraction) and `images`; the same on every rank. For lists of classes `map` (mean average precision
        over the classes that an image has, see `average_precisions`), `loss` (mean binary cross-entropy over classes
        and images) and `images`. If images could not be read, `broken` is their number.

    Raises:
        DatasetError: An image cannot be read, or more images than the policy allows, or the model does not answer as
            the images are labelled (see `check_problem`), or has other classes.
    """
    if isinstance(model, PreTrainedModel):
        check_problem(model.config, is_multi_label=is_multi_label(split))
        split = align_split(split, model.config)
    options = LoaderOptions(batch_size, num_workers, decoding or Decoding())
    return compute_figures(predict_split(model, split, processor, options, accelerator=accelerator))


def compute_figures(predictions: Predictions) -> Figures:
    """Compute the figures that `evaluate_model` returns."""
    return predictions.figures | ({"broken": predictions.broken} if predictions.broken else {})


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
    kind = predictions_of(split)
    *vectors, broken = _predict_shard(model, processor, batches, kind, kind.blank(len(split), class_count(split)))
    if accelerator is not None and ranks.world > 1:
        # Each place was written by one rank, so the sum is a union.
        *vectors, broken = (
            accelerator.reduce(tensor.to(accelerator.device), reduction="sum").cpu() for tensor in (*vectors, broken)
        )
    places = np.flatnonzero(broken.numpy())
    if ranks.rank == 0:
        for place in places[: decoding.max_broken].tolist():
            treatment = "left out" if decoding.broken == "skip" else "grey"
            logger.warning(f"evaluation: {loader.images.describe(place)}: {treatment}")
    check_broken(len(places), decoding, "the evaluation")
    columns = [vector.numpy() for vector in vectors]
    if decoding.broken == "skip":
        columns = [np.delete(column, places, axis=0) for column in columns]
    if not len(columns[0]):
        raise DatasetError("data: the evaluation split has no readable image; fix its files, or set data.eval_split")
    return kind._make([*columns, len(places)])


@torch.no_grad()
def _predict_shard(
    model: nn.Module, processor: BaseImageProcessor, batches: Iterable[ImageBatch], kind: Kind, fields: list[Tensor]
) -> list[Tensor]:
    """Fill the fields of the predictions, in place, for the images of this rank.

    Returns:
        The fields, and a 1 for each broken image (N,).
    """
    device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
    broken = torch.zeros(len(fields[0]), dtype=torch.int64)
    with eval_mode(model), ExitStack() as layout:
        for number, (positions, pixels, labels, is_replacement) in enumerate(batches):
            pixel_values = normalised(pixels.to(device, non_blocking=True), processor)
            if number == 0:
                layout.enter_context(in_fast_layout(model, pixel_values))
            logits = model(pixel_values=pixel_values).logits.cpu().double()
            for field, part in zip(fields, kind.record(logits, labels), strict=True):
                field[positions] = part
            broken[positions] = is_replacement.long()
    return [*fields, broken]


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
