"""Judge a cut network by images that its repair did not see: `hold_out` sets them aside, `Judge` compares logits.

The measure is the mean Kullback-Leibler divergence of the dense network's probabilities from those of the cut one, at
the scale of the logits around their mean that suits the cut one best: a ridge pulls outputs towards their mean. Labels
are not used.
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
NEGLIGIBLE = 1e-8  # nats: smaller differences between divergences are those of rounding


class Judgement(NamedTuple):
    """How near a cut network is to the dense one.

    Args:
        divergence: Mean divergence at the scale, in nats; infinite if logits are not finite.
        scale: Factor of the distances of the logits from `center` at which the divergence is smallest; 1 if the gain
            over 1 is negligible or below its standard error.
        center: Mean logits of the cut network over the images, (classes,), in float64 on the CPU.
    """

    divergence: float
    scale: float
    center: torch.Tensor


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
        found = _logits(pruned, self._calibration.batches)
        nothing = torch.zeros(len(pruned.config.id2label or {}), dtype=torch.float64)  # a rank may have no images
        total = sum((logits.sum(0) for logits in found), start=nothing)
        center = self._mean(total.to(pruned.device)).cpu()
        plain = SCALES.index(1)
        sums = torch.zeros(2, len(SCALES), dtype=torch.float64)
        for wanted, logits in zip(self._wanted, found, strict=True):
            scaled = [_divergence(wanted, center + scale * (logits - center)) for scale in SCALES]
            gains = torch.stack(scaled) - scaled[plain]
            sums += torch.stack([torch.stack(scaled).sum(1), (gains**2).sum(1)])
        means, squares = self._mean(sums.to(pruned.device)).cpu().nan_to_num(nan=torch.inf)
        best = int(means.argmin())
        gain = float(means[plain] - means[best])
        error = max(float(squares[best]) - gain**2, 0.0) / max(self.images - 1, 1)  # squared, of the mean gain
        best = best if gain > max(error**0.5, NEGLIGIBLE) else plain
        return Judgement(float(means[best]), SCALES[best], center)

    def _mean(self, total: torch.Tensor) -> torch.Tensor:
        """Return the mean over the images of all ranks, from this rank's sum."""
        return sum_over_ranks(total, self._calibration.accelerator) / self.images


def _logits(model: IsoPruneForImageClassification, batches: Batches) -> list[torch.Tensor]:
    """Compute the logits of each micro-batch, in float64 on the CPU."""
    with scoring_mode(model, requires_grad=False), torch.no_grad():
        return [model(pixel_values=images.to(model.device)).logits.double().cpu() for images, _ in batches]


def _divergence(wanted: torch.Tensor, found: torch.Tensor) -> torch.Tensor:
    """Compute the divergence of the probabilities of logits (B, classes) for each image."""
    target = wanted.log_softmax(-1)
    return (target.exp() * (target - found.log_softmax(-1))).sum(-1)
