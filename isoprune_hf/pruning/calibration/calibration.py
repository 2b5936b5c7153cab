"""The calibration sample as one value: `Calibration`, its type aliases, and `finite_batches`."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from accelerate import Accelerator

from isoprune_hf.errors import RecipeError
from isoprune_hf.recipes.values import Precision

Batch = tuple[torch.Tensor, torch.Tensor]  # images (B, C, H, W), labels (B,)
Batches = Iterable[Batch]


@dataclass(frozen=True, eq=False)
class Calibration:
    """Images for passes over a model, and how these passes run.

    Args:
        batches: This rank's micro-batches: images (B, C, H, W), labels (B,). A repair or a rotation iterates over them
            several times; a criterion needs one pass.
        accelerator: Ranks that share the images; None for this process only.
        precision: bf16 runs forward and backward passes under autocast; sums over images stay in float64.
    """

    batches: Batches
    accelerator: Accelerator | None = None
    precision: Precision = "no"

    @property
    def rank(self) -> int:
        """Return the rank of this process."""
        return 0 if self.accelerator is None else self.accelerator.process_index


def finite_batches(batches: Batches) -> Iterator[Batch]:
    """Yield micro-batches whose images are finite.

    Raises:
        RecipeError: An image has nan or inf.
    """
    for number, batch in enumerate(batches):
        images = batch[0]
        # A sum is ten times faster than a test of every element.
        if images.is_floating_point() and not images.sum().isfinite():
            broken = ~images.isfinite().flatten(1).all(1)
            if broken.any():
                raise RecipeError(
                    f"the calibration images contain nan or inf, first in image {int(broken.nonzero()[0])} of "
                    f"micro-batch {number}: check the data and its transform"
                )
        yield batch
