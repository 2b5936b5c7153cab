"""Copies of a cut network that are fitted beside it without some of the images, to be judged by these (`Trial`)."""

from typing import NamedTuple

from isoprune_hf.checkpoint.modeling_isoprune import IsoPruneForImageClassification
from isoprune_hf.pruning.calibration.calibration import Batches
from isoprune_hf.pruning.partial_passes.passes import Images


class Trial(NamedTuple):
    """A copy of a cut network that is fitted without some of the images, to be judged by them.

    Args:
        network: The copy, which is changed.
        left_out: This rank's micro-batches of these images: images (B, C, H, W), labels (B,).
        opposite: Another copy, which is fitted to the images that are left out, to be judged by the others.
    """

    network: IsoPruneForImageClassification
    left_out: Batches
    opposite: IsoPruneForImageClassification | None = None


class Share(NamedTuple):
    """The images that one network is fitted to.

    Args:
        network: The network.
        images: The images.
        first: Number of micro-batches of all images before them.
        has_own_ridges: Its ridges are chosen by its images; else they are those of the first network.
    """

    network: IsoPruneForImageClassification
    images: Images
    first: int
    has_own_ridges: bool


def shares_of(pruned: IsoPruneForImageClassification, images: Images, trial: Trial | None) -> list[Share]:
    """Return the images of each network to fit; those of the cut network itself are the last ones, and all."""
    if trial is None:
        return [Share(pruned, images, 0, True)]
    rest = Images([pixels for pixels, _ in trial.left_out])
    first, whole = Share(trial.network, images, 0, True), images + rest
    if trial.opposite is None:
        return [first, Share(pruned, whole, 0, False)]
    return [first, Share(trial.opposite, rest, len(images.parts), True), Share(pruned, whole, 0, True)]
