"""Compare the classes of pixels of a network with masks and with the dense network: call `evaluate_pixels`."""

from collections.abc import Sequence

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from transformers import BaseImageProcessor

from isoprune_hf.data.annotations import divide_annotations
from isoprune_hf.data.columns import MASK
from isoprune_hf.data.decoding import Rows
from isoprune_hf.data.loading import LoaderOptions
from isoprune_hf.data.masks import IGNORED, read_mask
from isoprune_hf.errors import DatasetError
from isoprune_hf.evaluation.comparing import compare_outputs
from isoprune_hf.evaluation.masks import classes_at, count_pixels, mask_figures
from isoprune_hf.evaluation.predictions import Figures
from isoprune_hf.models.held import HeldModel
from isoprune_hf.models.pixel_loss import PIXEL_CLASSES, classes_of_pixels

_IGNORING = ("semantic_loss_ignore_index", "loss_ignore_index")  # of configs


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
        split: Images with the columns `image` and `label`, which is not looked at, and `MASK` if there are
            masks.
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
    rows, masks = divide_annotations(split, MASK)
    if masks is not None and getattr(processor, "do_center_crop", False):
        raise DatasetError(
            "data: masks are compared with whole images, and the image processor crops them (do_center_crop); leave "
            "the column of masks out, or change the processor"
        )
    classes = max(model.config.num_labels or 2, 2)
    counts = torch.zeros(classes, classes, dtype=torch.int64)
    reduces_labels = bool(getattr(processor, "do_reduce_labels", False))

    def count(places: list[int], outputs: Sequence[Tensor]) -> None:
        for place, found in zip(places, outputs[0], strict=True):
            mask = read_mask(masks[place][MASK], reduces_labels=reduces_labels) if masks is not None else None
            if mask is not None:
                counts.add_(count_pixels(classes_at(found, mask.shape).cpu(), mask, classes, _ignored(model)))

    figures = compare_outputs(
        model,
        dense,
        rows,
        processor,
        options,
        {"same_class": _same_classes, "pixel_divergence": PIXEL_CLASSES.distances},
        accelerator=accelerator,
        visit=None if masks is None else count,
    )
    if accelerator is not None and accelerator.num_processes > 1:
        counts = accelerator.reduce(counts.to(accelerator.device), reduction="sum").cpu()
    return {**figures, **mask_figures(counts)}


def _same_classes(outputs: Sequence[Tensor], wanted: Sequence[Tensor]) -> Tensor:
    """Return the share of the pixels of each image that have the wanted class, (B,)."""
    same = classes_of_pixels(outputs[0]) == classes_of_pixels(wanted[0])
    return same.flatten(1).double().mean(1)


def _ignored(model: HeldModel) -> int:
    """Return the class of masks that the loss of the network leaves out, by the config of its library."""
    config = getattr(model.model, "config", None)
    named = [value for name in _IGNORING if (value := getattr(config, name, None)) is not None]
    return int(named[0]) if named else IGNORED
