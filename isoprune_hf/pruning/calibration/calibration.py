"""The calibration sample as one value: `Calibration`, and the type aliases of what it consists of."""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from accelerate import Accelerator

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
