"""Mixup and cutmix: the images of a part of a batch, each mixed with another one of it."""

from timm.data import Mixup
from torch import Tensor
from torchvision.transforms import v2

from isoprune_hf.data.augmentation import seeded_generators
from isoprune_hf.recipes import FinetuneRecipe


def mix(
    pixel_values: Tensor, labels: Tensor, recipe: FinetuneRecipe, *, num_classes: int, seeds: tuple[int, ...]
) -> tuple[Tensor, Tensor]:
    """Mix a part of a batch as the recipe says.

    Args:
        pixel_values: (B, C, H, W); may be changed in place. timm pairs the ends of a part, so B is even there.
        labels: Class indices (B,).
        recipe: Has the alphas and the pairing.
        num_classes: Of the classifier.
        seeds: What the mixing depends on, and nothing else.

    Returns:
        Images, and targets of shape (B, num_classes); the labels as they were where nothing is mixed.

    Source:
        Zhang et al., mixup, ICLR 2018; Yun et al., CutMix, ICCV 2019.
    """
    if not recipe.mixup and not recipe.cutmix:
        return pixel_values, labels
    with seeded_generators(*seeds):
        if recipe.mixup_pairing == "flip":
            # Labels are smoothed by the loss.
            mixing = Mixup(recipe.mixup, recipe.cutmix, label_smoothing=0.0, num_classes=num_classes)
            return mixing(pixel_values, labels)
        kinds = [(v2.MixUp, recipe.mixup), (v2.CutMix, recipe.cutmix)]
        mixing = v2.RandomChoice([kind(alpha=alpha, num_classes=num_classes) for kind, alpha in kinds if alpha])
        return mixing(pixel_values, labels)
