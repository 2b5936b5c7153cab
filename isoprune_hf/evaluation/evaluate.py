"""What an accuracy in the card is: every image of the split once, whatever the number of ranks."""

import logging
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor, nn
from tqdm import tqdm
from transformers import BaseImageProcessor

from isoprune_hf.data.dataset import Dataset
from isoprune_hf.data.decoding import Decoding, check_broken
from isoprune_hf.data.loading import eval_loader
from isoprune_hf.data.pixels import normalised
from isoprune_hf.errors import DatasetError
from isoprune_hf.evaluation.metrics import TOP, ImageClassificationMetric, PerClassMetric, per_class_table
from isoprune_hf.terminal import has_bars

logger = logging.getLogger(__name__)  # also where there is no accelerator


class Scores(NamedTuple):
    """What a model says of the N images of a split, the same on every rank.

    Args:
        predictions: Ids of the top classes, best first, of shape (N, 5); -1 where there are fewer classes.
        references: Labels of shape (N,).
        losses: Cross-entropies of shape (N,) in fp64.
        confidences: Probabilities of the top class, of shape (N,) in fp64.
        broken: Images that could not be read; they are left out, or grey.
    """

    predictions: np.ndarray
    references: np.ndarray
    losses: np.ndarray
    confidences: np.ndarray
    broken: int

    @property
    def columns(self) -> dict[str, np.ndarray]:
        """What the metrics take."""
        return {name: column for name, column in self._asdict().items() if name != "broken"}


def evaluate_model(
    model: nn.Module,
    split: Dataset,
    processor: BaseImageProcessor,
    *,
    accelerator: Accelerator | None = None,
    batch_size: int = 64,
    num_workers: int = 0,
    decoding: Decoding | None = None,
) -> dict[str, float | int]:
    """Evaluate an image classifier, on the device where it is; see `score_split` for the arguments.

    Returns:
        `top1` and `top5` as fractions, `loss` (mean cross-entropy in fp64), `ece` (expected calibration error over 15
        bins, a fraction) and `images`; the same on every rank. Where images could not be read, `broken` says how many.
    """
    options = {"accelerator": accelerator, "batch_size": batch_size, "num_workers": num_workers}
    return compute_figures(score_split(model, split, processor, **options, decoding=decoding))


def compute_figures(scores: Scores) -> dict[str, float | int]:
    """Compute the figures of `evaluate_model`."""
    figures = ImageClassificationMetric(keep_in_memory=True).compute(**scores.columns)
    return figures | ({"broken": scores.broken} if scores.broken else {})


def tabulate_classes(scores: Scores, label_names: Sequence[str]) -> str:
    """Write the figures of each class as CSV: images, top1, top5, loss, mean confidence, and how often predicted."""
    figures = PerClassMetric(keep_in_memory=True).compute(**scores.columns, num_classes=len(label_names))
    return per_class_table(figures, label_names)


def score_split(
    model: nn.Module,
    split: Dataset,
    processor: BaseImageProcessor,
    *,
    accelerator: Accelerator | None = None,
    batch_size: int = 64,
    num_workers: int = 0,
    decoding: Decoding | None = None,
) -> Scores:
    """Let an image classifier see every image of a split once, on the device where it is.

    Rank r takes the images r, r + world, ... and writes them into vectors as long as the split, which are summed over
    the ranks. So every image counts once for any number of ranks, also when some have none. All ranks must call this
    with the same split.

    Args:
        model: Gives `.logits` of shape (B, C) for `pixel_values`; not wrapped, or a wrapper is taken off.
        split: Images with the columns `image` and `label`.
        processor: Makes the pixel values.
        accelerator: The ranks that share the work; without it there is one.
        batch_size: Images in a batch on each rank.
        num_workers: Loader processes on each rank.
        decoding: How images are read; without it, one that cannot be read is an error.

    Raises:
        DatasetError: An image cannot be read, or more of them than the policy allows.
    """
    decoding = decoding or Decoding()
    rank, world = (0, 1) if accelerator is None else (accelerator.process_index, accelerator.num_processes)
    model = model if accelerator is None else accelerator.unwrap_model(model)
    options = {"batch_size": batch_size, "num_workers": num_workers, "decoding": decoding}
    loader = eval_loader(split, processor, rank=rank, world=world, **options)
    # The terminal of the main process alone shows a bar; a log file shows none.
    is_shown = rank == 0 and has_bars()
    batches = tqdm(loader, desc="evaluate", unit="batch", leave=False, disable=not is_shown)
    vectors = _score_images(model, processor, batches, len(split))
    if world > 1:
        # `reduce` hands back new tensors; every place was written by one rank, so the sum is a union.
        vectors = [accelerator.reduce(vector.to(accelerator.device), reduction="sum").cpu() for vector in vectors]
    *vectors, broken = (vector.numpy() for vector in vectors)
    places = np.flatnonzero(broken)
    if rank == 0:
        for place in places[: decoding.max_broken].tolist():
            what = "left out" if decoding.broken == "skip" else "grey"
            logger.warning(f"evaluation: {loader.dataset.describe(place)}: {what}")
    check_broken(len(places), decoding, "the evaluation")
    if decoding.broken == "skip":
        vectors = [np.delete(vector, places, axis=0) for vector in vectors]
    if not len(vectors[0]):
        raise DatasetError("data: the evaluation has no image that can be read")
    return Scores(*vectors, broken=len(places))


@torch.no_grad()
def _score_images(
    model: nn.Module, processor: BaseImageProcessor, loader: Iterable[tuple[Tensor, ...]], images: int
) -> list[Tensor]:
    """Return the vectors of `Scores`, zero where another rank works, and a 1 for each broken image (N,)."""
    device = next(model.parameters()).device
    top = torch.zeros(images, TOP, dtype=torch.int64)
    references = torch.zeros(images, dtype=torch.int64)
    losses = torch.zeros(images, dtype=torch.float64)
    confidences = torch.zeros(images, dtype=torch.float64)
    broken = torch.zeros(images, dtype=torch.int64)
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        for noted, pixel_values, labels in loader:
            positions = torch.where(noted < 0, ~noted, noted)
            pixel_values = normalised(pixel_values.to(device, non_blocking=True), processor)
            logits = model(pixel_values=pixel_values).logits.cpu().double()
            best = logits.topk(min(TOP, logits.shape[1]), dim=1).indices
            top[positions] = nn.functional.pad(best, (0, TOP - best.shape[1]), value=-1)
            references[positions] = labels
            losses[positions] = nn.functional.cross_entropy(logits, labels, reduction="none")
            confidences[positions] = logits.softmax(dim=1).amax(dim=1)
            broken[positions] = (noted < 0).long()
    finally:
        for module, training in modes:
            module.training = training
    return [top, references, losses, confidences, broken]
