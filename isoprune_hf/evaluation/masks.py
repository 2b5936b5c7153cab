"""Count the pixels of masks by their class and the one that a network finds: `count_pixels`, `mask_figures`."""

import torch
from torch import Tensor, nn

from isoprune_hf.data.masks import IGNORED
from isoprune_hf.errors import DatasetError
from isoprune_hf.models.pixel_loss import classes_of_pixels


def count_pixels(found: Tensor, wanted: Tensor, classes: int, ignored: int = IGNORED) -> Tensor:
    """Count the pixels of each class that are found as each class.

    Args:
        found: Classes of pixels.
        wanted: Those of a mask, of the same shape.
        classes: Number of classes.
        ignored: Class of the mask whose pixels are left out.

    Returns:
        Counts of shape (classes wanted, classes found) in int64.

    Raises:
        DatasetError: The mask has another class.
    """
    found, wanted = found.flatten(), wanted.flatten()
    is_counted = wanted != ignored
    found, wanted = found[is_counted], wanted[is_counted]
    if wanted.numel() and not 0 <= int(wanted.min()) <= int(wanted.max()) < classes:
        raise DatasetError(
            f"data: a mask has the classes {int(wanted.min())} to {int(wanted.max())}, and the model has {classes}; "
            f"pixels of the class {ignored} are left out"
        )
    return torch.bincount(wanted * classes + found, minlength=classes**2).reshape(classes, classes)


def mask_figures(counts: Tensor) -> dict[str, float]:
    """Compute the figures of counts (classes wanted, classes found).

    Returns:
        `miou`: the mean, over the classes that are wanted or found anywhere, of the pixels that are both wanted and
        found as a class, divided by those that are one of the two. `pixel_accuracy`: the share of the pixels that are
        found as their class. Empty without a pixel.

    Source:
        Everingham et al., The PASCAL visual object classes challenge: a retrospective, IJCV 2015, section 4.3, over
        all pixels of all images.
    """
    counts = counts.double()
    right = counts.diagonal()
    union = counts.sum(0) + counts.sum(1) - right
    if not union.any():
        return {}
    return {"miou": float((right / union)[union > 0].mean()), "pixel_accuracy": float(right.sum() / counts.sum())}


def classes_at(logits: Tensor, size: torch.Size) -> Tensor:
    """Return the classes of the pixels of one image, resized to a size as image processors of transformers resize.

    Args:
        logits: (C, h, w).
        size: (H, W).
    """
    resized = nn.functional.interpolate(logits[None].float(), size=size, mode="bilinear", align_corners=False)
    return classes_of_pixels(resized)[0]
