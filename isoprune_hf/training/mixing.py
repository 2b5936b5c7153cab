"""Mixup and CutMix within a part of a batch: call `mix`."""

from timm.data.mixup import Mixup
from torch import Tensor
from torchvision.transforms import v2

from isoprune_hf.data.augmentation import seeded_generators
from isoprune_hf.recipes import FinetuneRecipe


def mix(
    pixel_values: Tensor, labels: Tensor, recipe: FinetuneRecipe, *, num_classes: int, seeds: tuple[int, ...]
) -> tuple[Tensor, Tensor]:
    """Mix each image of a part of a batch with another one, by the recipe.

    Args:
        pixel_values: Images (B, C, H, W); may be changed in place. With `mixup_pairing` flip, B must be even.
        labels: Class indices (B,), or targets (B, num_classes).
        recipe: Alphas and pairing.
        num_classes: Number of classes.
        seeds: Numbers that seed the mixing; it depends on nothing else.

    Returns:
        Images, and targets of shape (B, num_classes); the unchanged arguments if the recipe mixes nothing.

    Source:
        Zhang et al., mixup, ICLR 2018; Yun et al., CutMix, ICCV 2019.
    """
    if not recipe.mixup and not recipe.cutmix:
        return pixel_values, labels
    mixed: tuple[Tensor, Tensor]
    with seeded_generators(*seeds):
        if recipe.mixup_pairing == "flip":
            # Without label smoothing, which the loss applies.
            flip = Mixup(  # type: ignore[no-untyped-call]  # timm
                recipe.mixup, recipe.cutmix, label_smoothing=0.0, num_classes=num_classes, multi_label=labels.ndim == 2
            )
            mixed = flip(pixel_values, labels)
        else:
            kinds = [(v2.MixUp, recipe.mixup), (v2.CutMix, recipe.cutmix)]
            choice = v2.RandomChoice([kind(alpha=alpha, num_classes=num_classes) for kind, alpha in kinds if alpha])
            mixed = choice(pixel_values, labels)
    return mixed
