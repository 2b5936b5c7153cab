"""Compare the classes of pixels of a network with masks and with the dense network: call `evaluate_pixels`."""

from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from transformers import BaseImageProcessor

from isoprune_hf.data.columns import MASK
from isoprune_hf.data.decoding import Rows, check_broken
from isoprune_hf.data.loading import ALONE, ImageBatch, LoaderOptions, Ranks, eval_loader
from isoprune_hf.data.masks import IGNORED, divide_masks, read_mask
from isoprune_hf.data.pixels import normalised
from isoprune_hf.errors import DatasetError
from isoprune_hf.evaluation.evaluate import eval_mode
from isoprune_hf.evaluation.masks import classes_at, count_pixels, mask_figures
from isoprune_hf.evaluation.predictions import Figures
from isoprune_hf.models.held import HeldModel
from isoprune_hf.models.pixel_loss import PIXEL_CLASSES, classes_of_pixels
from isoprune_hf.terminal import with_progress

_REDUCING = "do_reduce_labels"  # of image processors
_IGNORING = ("semantic_loss_ignore_index", "loss_ignore_index")  # of configs


class Comparison(NamedTuple):
    """The N images of a split, the same on every rank.

    Args:
        agreements: Share of the pixels of the logits whose class is that of the dense network, (N,).
        divergences: Mean divergence of a pixel's probabilities from the dense ones, (N,) in nats.
        broken: Whether the image could not be read, (N,).
        counts: Pixels of the masks of each class that are found as each class, (classes, classes).
    """

    agreements: Tensor
    divergences: Tensor
    broken: Tensor
    counts: Tensor


def evaluate_pixels(
    model: HeldModel,
    dense: nn.Module | None,
    split: Rows,
    processor: BaseImageProcessor,
    options: LoaderOptions,
    *,
    accelerator: Accelerator | None = None,
) -> Figures:
    """Compute how near the classes of pixels are to those of masks, and of the dense base.

    Args:
        model: Gives logits of classes for pixels, on its current device.
        dense: The dense network, on the same device; None if the model is the dense one, or it is not known.
        split: Images with the columns `image` and `label`, which is not looked at, and `mask` if there are masks.
        processor: Makes the pixel values.
        options: How the images are loaded.
        accelerator: The ranks that share the work. All must call this with the same split.

    Returns:
        `same_class`: share of the pixels of the logits whose class is that of the dense network, and
        `pixel_divergence`: mean Kullback-Leibler divergence of a pixel from the dense probabilities, in nats; both
        without `dense` left out. With masks those of `mask_figures`. `images`, and `broken` if images could not be
        read.

    Raises:
        DatasetError: An image cannot be read, or more images than the policy allows, or a mask does not fit.
    """
    ranks = ALONE if accelerator is None else Ranks(accelerator.process_index, accelerator.num_processes)
    rows, masks = divide_masks(split)
    if masks is not None and getattr(processor, "do_center_crop", False):
        raise DatasetError(
            "data: masks are compared with whole images, and the image processor crops them (do_center_crop); leave "
            "the column of masks out, or change the processor"
        )
    loader = eval_loader(rows, processor, options, ranks)
    batches = with_progress(loader, "evaluate", "batch", rank=ranks.rank)
    found = _compare_shard(model, dense, processor, batches, masks, len(split))
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
    figures |= mask_figures(found.counts)
    return figures | ({"broken": int(broken.sum())} if broken.any() else {})


@torch.no_grad()
def _compare_shard(
    model: HeldModel,
    dense: nn.Module | None,
    processor: BaseImageProcessor,
    batches: Iterable[ImageBatch],
    masks: Rows | None,
    images: int,
) -> Comparison:
    """Return the comparison, zero for images of other ranks."""
    device = next(model.parameters()).device
    classes = max(model.config.num_labels or 2, 2)
    agreements, divergences, broken = (torch.zeros(images, dtype=torch.float64) for _ in range(3))
    counts = torch.zeros(classes, classes, dtype=torch.int64)
    with eval_mode(model), eval_mode(dense or model):
        for positions, pixels, _, is_replacement in batches:
            broken[positions] = is_replacement.double()
            if dense is None and masks is None:
                continue
            pixel_values = normalised(pixels.to(device, non_blocking=True), processor)
            outputs = model(pixel_values=pixel_values).outputs
            if dense is not None:
                wanted = dense(pixel_values=pixel_values).outputs
                same = classes_of_pixels(outputs[0]) == classes_of_pixels(wanted[0])
                agreements[positions] = same.flatten(1).double().mean(1).cpu()
                divergences[positions] = PIXEL_CLASSES.distances(outputs, wanted).double().cpu()
            for place, logits in zip(positions[~is_replacement].tolist(), outputs[0][~is_replacement], strict=True):
                if masks is not None:
                    mask = read_mask(masks[place][MASK], reduces_labels=bool(_setting(processor, _REDUCING)))
                    counts += count_pixels(classes_at(logits, mask.shape).cpu(), mask, classes, _ignored(model))
    return Comparison(agreements, divergences, broken, counts)


def _ignored(model: HeldModel) -> int:
    """Return the class of masks that the loss of the network leaves out, by the config of its library."""
    config = getattr(model.model, "config", None)
    return int(next((value for name in _IGNORING if (value := _setting(config, name)) is not None), IGNORED))


def _setting(owner: object, name: str) -> Any:
    return getattr(owner, name, None)
