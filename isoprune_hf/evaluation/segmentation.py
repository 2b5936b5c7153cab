"""Compare the classes of pixels of a network with those of the dense one on a split: call `evaluate_pixels`."""

from collections.abc import Iterable
from typing import NamedTuple

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from transformers import BaseImageProcessor

from isoprune_hf.data.decoding import Rows, check_broken
from isoprune_hf.data.loading import ALONE, ImageBatch, LoaderOptions, Ranks, eval_loader
from isoprune_hf.data.pixels import normalised
from isoprune_hf.errors import DatasetError
from isoprune_hf.evaluation.evaluate import eval_mode
from isoprune_hf.evaluation.predictions import Figures
from isoprune_hf.models.held import HeldModel
from isoprune_hf.models.pixel_loss import PIXEL_CLASSES, classes_of_pixels
from isoprune_hf.terminal import with_progress


class Comparison(NamedTuple):
    """The N images of a split, the same on every rank.

    Args:
        agreements: Share of the pixels of the logits whose class is that of the dense network, (N,).
        divergences: Mean divergence of a pixel's probabilities from the dense ones, (N,) in nats.
        broken: Whether the image could not be read, (N,).
    """

    agreements: Tensor
    divergences: Tensor
    broken: Tensor


def evaluate_pixels(
    model: HeldModel,
    dense: nn.Module | None,
    split: Rows,
    processor: BaseImageProcessor,
    options: LoaderOptions,
    *,
    accelerator: Accelerator | None = None,
) -> Figures:
    """Compute how near the classes of pixels are to those of the dense base.

    Args:
        model: Gives logits of classes for pixels, on its current device.
        dense: The dense network, on the same device; None if the model is the dense one, or it is not known.
        split: Images with the columns `image` and `label`; the labels are not looked at.
        processor: Makes the pixel values.
        options: How the images are loaded.
        accelerator: The ranks that share the work. All must call this with the same split.

    Returns:
        `same_class`: share of the pixels of the logits whose class is that of the dense network, and
        `pixel_divergence`: mean Kullback-Leibler divergence of a pixel from the dense probabilities, in nats; both
        without `dense` left out. `images`, and `broken` if images could not be read.

    Raises:
        DatasetError: An image cannot be read, or more images than the policy allows.
    """
    ranks = ALONE if accelerator is None else Ranks(accelerator.process_index, accelerator.num_processes)
    loader = eval_loader(split, processor, options, ranks)
    batches = with_progress(loader, "evaluate", "batch", rank=ranks.rank)
    found = _compare_shard(model, dense, processor, batches, len(split))
    if accelerator is not None and ranks.world > 1:
        # Each place was written by one rank, so the sum is a union.
        parts = (accelerator.reduce(part.to(accelerator.device), reduction="sum").cpu() for part in found)
        found = Comparison(*parts)
    broken = found.broken > 0
    check_broken(int(broken.sum()), options.decoding, "the evaluation")
    read = ~broken if options.decoding.broken == "skip" else torch.ones_like(broken)
    if not read.any():
        raise DatasetError("data: the evaluation split has no readable image; fix its files, or set data.eval_split")
    figures: Figures = {"images": int(read.sum())}
    if dense is not None:
        figures["same_class"] = float(found.agreements[read].mean())
        figures["pixel_divergence"] = float(found.divergences[read].mean())
    return figures | ({"broken": int(broken.sum())} if broken.any() else {})


@torch.no_grad()
def _compare_shard(
    model: HeldModel,
    dense: nn.Module | None,
    processor: BaseImageProcessor,
    batches: Iterable[ImageBatch],
    images: int,
) -> Comparison:
    """Return the comparison, zero for images of other ranks."""
    device = next(model.parameters()).device
    found = Comparison(*(torch.zeros(images, dtype=torch.float64) for _ in Comparison._fields))
    with eval_mode(model), eval_mode(dense or model):
        for positions, pixels, _, is_replacement in batches:
            found.broken[positions] = is_replacement.double()
            if dense is None:
                continue
            pixel_values = normalised(pixels.to(device, non_blocking=True), processor)
            outputs = model(pixel_values=pixel_values).outputs
            wanted = dense(pixel_values=pixel_values).outputs
            same = classes_of_pixels(outputs[0]) == classes_of_pixels(wanted[0])
            found.agreements[positions] = same.flatten(1).double().mean(1).cpu()
            found.divergences[positions] = PIXEL_CLASSES.distances(outputs, wanted).double().cpu()
    return found
