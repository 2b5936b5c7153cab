"""The images of trial cuts: those that predictions are fitted to, and those that judge (`split_images`)."""

from typing import NamedTuple

import torch

from isoprune_hf.pruning.calibration.calibration import Calibration, finite_batches
from isoprune_hf.pruning.calibration.gradients import sum_over_ranks
from isoprune_hf.pruning.partial_passes.passes import Images
from isoprune_hf.pruning.partial_passes.storage import Storage

_ONE_OF = 8  # images of each micro-batch is set aside


class TrialImages(NamedTuple):
    """This rank's images.

    Args:
        fitted: Those that predictions are fitted to.
        aside: Number of a micro-batch among those of all ranks, and its images that are set aside.
        total: Images of all ranks.
        held: Images of all ranks that are set aside.
        batches: Micro-batches of all ranks.
    """

    fitted: Images
    aside: list[tuple[int, torch.Tensor]]
    total: int
    held: int
    batches: int

    def judging(self, judges: int) -> Images:
        """Return this rank's share of about so many of the images that are set aside.

        The micro-batches contribute evenly, the first ones more. Images of different ones do not pass together, so
        that neither the images nor the rounding of their passes depend on the number of ranks.
        """
        chosen = [
            images[: self._share(number + 1, judges) - self._share(number, judges)] for number, images in self.aside
        ]
        return Images([images for images in chosen if len(images)])

    def _share(self, number: int, judges: int) -> int:
        """Return how many of so many images the first micro-batches contribute."""
        return -(-number * judges // self.batches)


def split_images(calibration: Calibration, storage: Storage) -> TrialImages:
    """Set the last eighth of each micro-batch aside, at least one image of several.

    Raises:
        RecipeError: An image has nan or inf.
    """
    accelerator = calibration.accelerator
    processes = 1 if accelerator is None else accelerator.num_processes
    fitted: list[torch.Tensor] = []
    aside: list[tuple[int, torch.Tensor]] = []
    for number, (images, _) in enumerate(finite_batches(calibration.batches)):
        stored = storage.hold(images)
        count = len(stored) - count_held(len(stored))
        fitted += [stored[:count]] if count else []
        aside.append((number * processes + calibration.rank, stored[count:]))
    held = sum(len(images) for _, images in aside)
    own = Images(fitted)
    counts = torch.tensor([own.count + held, held, len(aside)], device=storage.device)
    return TrialImages(own, aside, *sum_over_ranks(counts, accelerator).tolist())


def count_held(images: int) -> int:
    """Return how many of the images of a micro-batch are set aside."""
    return max(images // _ONE_OF, int(images > 1))
