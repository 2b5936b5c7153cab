"""Judge a cut network by images that its repair did not see: `hold_out` sets them aside, `Judge` compares logits.

The measure is the mean Kullback-Leibler divergence of the dense network's probabilities from those of the cut one, at
the scale of the logits that suits the cut one best. Labels are not used.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch

from isoprune_hf.checkpoint.modeling_isoprune import IsoPruneForImageClassification
from isoprune_hf.pruning.calibration.calibration import Batch, Batches, Calibration
from isoprune_hf.pruning.calibration.gradients import scoring_mode, sum_over_ranks

# The scales of logits that are compared: a repaired network is less confident than the dense one.
SCALES = tuple(2 ** (step / 8) for step in range(-8, 33))
_HELD_OUT = 5  # one of so many images of each micro-batch


class Judgement(NamedTuple):
    """How near a cut network is to the dense one.

    Args:
        divergence: Mean divergence at the best scale, in nats; infinite if logits are not finite.
        scale: Factor of the logits at which it is smallest.
    """

    divergence: float
    scale: float


@dataclass(frozen=True, eq=False)
class _Part:
    """One part of every micro-batch: the images before the held-out ones, or these."""

    batches: Batches
    is_held_out: bool

    def __iter__(self) -> Iterator[Batch]:
        for images, labels in self.batches:
            first = len(images) - len(images) // _HELD_OUT
            part = slice(first, None) if self.is_held_out else slice(first)
            if len(images[part]):
                yield images[part], labels[part]


def hold_out(calibration: Calibration) -> tuple[Calibration, Calibration]:
    """Split the images of each micro-batch: most of them for a repair, every fifth to judge it.

    A micro-batch of fewer than five images is not split. The split does not depend on which rank has a micro-batch.
    """
    fitted, held = (replace(calibration, batches=_Part(calibration.batches, which)) for which in (False, True))
    return fitted, held


class Judge:
    """Compares cut networks with the dense one on the same images.

    Args:
        dense: The network before the cut.
        calibration: The images; every rank has its own.
    """

    def __init__(self, dense: IsoPruneForImageClassification, calibration: Calibration):
        self._calibration = calibration
        self._wanted = _logits(dense, calibration.batches)
        count = torch.tensor(sum(len(part) for part in self._wanted), device=dense.device)
        self.images = int(sum_over_ranks(count, calibration.accelerator))

    def compare(self, pruned: IsoPruneForImageClassification) -> Judgement:
        """Compute the divergence of a cut network, and its best scale; there must be images."""
        total = torch.zeros(len(SCALES), dtype=torch.float64, device=pruned.device)
        for wanted, found in zip(self._wanted, _logits(pruned, self._calibration.batches), strict=True):
            total += torch.stack([_divergence(wanted, scale * found) for scale in SCALES]).to(total.device)
        means = (sum_over_ranks(total, self._calibration.accelerator) / self.images).nan_to_num(nan=torch.inf)
        best = int(means.argmin())
        return Judgement(float(means[best]), SCALES[best])


def _logits(model: IsoPruneForImageClassification, batches: Batches) -> list[torch.Tensor]:
    """Compute the logits of each micro-batch, in float64 on the CPU."""
    with scoring_mode(model, requires_grad=False), torch.no_grad():
        return [model(pixel_values=images.to(model.device)).logits.double().cpu() for images, _ in batches]


def _divergence(wanted: torch.Tensor, found: torch.Tensor) -> torch.Tensor:
    """Compute the divergence of the probabilities of logits (B, classes), summed over images."""
    target = wanted.log_softmax(-1)
    return (target.exp() * (target - found.log_softmax(-1))).sum()
