"""Judge a cut network by images that its repair did not see: `split_images` sets them aside, `Judge` compares logits.

The measure is the mean Kullback-Leibler divergence of the dense network's probabilities from those of the cut one, at
the scale of the logits around their mean that suits the cut one best: a ridge pulls outputs towards their mean. For
outputs that are no logits of classes or labels it is the sum of their squared differences, as a share of the mean sum
of squares of the dense outputs, at scale 1. Labels are not used.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from operator import length_hint
from typing import NamedTuple

import torch

from isoprune_hf.checkpoint.modeling_isoprune import IsoPruneForImageClassification
from isoprune_hf.models.held import objective_of
from isoprune_hf.pruning.calibration.calibration import Batch, Batches, Calibration
from isoprune_hf.pruning.calibration.gradients import scoring_mode, sum_over_ranks
from isoprune_hf.terminal import with_progress

# The scales of logits that are compared: a repaired network is less confident than the dense one.
SCALES = tuple(2 ** (step / 8) for step in range(-8, 33))
_PLAIN = SCALES.index(1)
HELD_OUT = 5  # one of so many images of each micro-batch
FEW = 64  # images: a fifth of fewer is too small a sample
NEGLIGIBLE = 1e-8  # nats: smaller differences between divergences are those of rounding


class Divergences(NamedTuple):
    """Sums over images that a cut network was compared on.

    Args:
        sums: Divergences at each of `SCALES`, the squares of their differences from that at scale 1, and the squared
            distances of the outputs from the dense ones, (3, scales).
        logits: Logits of the cut network, (classes,).
        images: Number of images of all ranks.
        nearer: Number of images for which the network is as near to the dense one as the cut, or nearer.
    """

    sums: torch.Tensor
    logits: torch.Tensor
    images: int
    nearer: int


class Judgement(NamedTuple):
    """How near a cut network is to the dense one.

    Args:
        divergence: Mean divergence at the scale, in nats; infinite if logits are not finite.
        scale: Factor of the distances of the logits from `center` at which the divergence is smallest; 1 if the gain
            over 1 is negligible or below its standard error.
        center: Mean logits of the cut network over the images, (classes,), in float64 on the CPU.
        nearer: Number of images for which it is as near as without a repair, or nearer.
        distance: Mean squared distance of the outputs from the dense ones, at scale 1.
    """

    divergence: float
    scale: float
    center: torch.Tensor
    nearer: int
    distance: float


@dataclass(frozen=True, eq=False)
class _Part:
    """One part of every micro-batch: its last images, one of so many, or those before them."""

    batches: Batches
    one_of: int
    is_last: bool

    def __iter__(self) -> Iterator[Batch]:
        for images, labels in self.batches:
            first = len(images) - len(images) // self.one_of
            part = slice(first, None) if self.is_last else slice(first)
            if len(images[part]):
                yield images[part], labels[part]

    def __length_hint__(self) -> int:
        return length_hint(self.batches)


def split_images(calibration: Calibration, device: torch.device) -> tuple[tuple[Calibration, Calibration], ...]:
    """Split the images of each micro-batch into those for a repair and those that judge it.

    Every fifth of many images judges. Of fewer than 64, each half judges a repair with the other half, so that all of
    them judge. A micro-batch of fewer images than parts is not split, and the split does not depend on which rank has
    a micro-batch.

    Args:
        calibration: The images; every rank has its own.
        device: The device of sums over ranks.

    Returns:
        A pair for each repair; none if no image can be set aside.
    """
    count = 0
    for images, _ in calibration.batches:
        count += len(images)
        if count >= FEW:
            break
    is_few = int(sum_over_ranks(torch.tensor(count, device=device), calibration.accelerator)) < FEW
    first, last = (
        replace(calibration, batches=_Part(calibration.batches, 2 if is_few else HELD_OUT, which))
        for which in (False, True)
    )
    return ((first, last), (last, first)) if is_few else ((first, last),)


class Judge:
    """Compares cut networks with the dense one on the same images.

    Args:
        dense: The network before the cut.
        cut: The network after it, without a repair.
        calibration: The images; every rank has its own.
    """

    def __init__(
        self, dense: IsoPruneForImageClassification, cut: IsoPruneForImageClassification, calibration: Calibration
    ):
        self._calibration = calibration
        self._divergence = objective_of(dense).divergence
        self._wanted = _logits(dense, calibration)
        count = torch.tensor(sum(len(part) for part in self._wanted), device=dense.device)
        self.images = int(sum_over_ranks(count, calibration.accelerator))
        squares = torch.tensor(sum(float(part.square().sum()) for part in self._wanted), dtype=torch.float64)
        self._size = float(self._sum(squares, dense.device)) / max(self.images, 1)
        found = _logits(cut, calibration)
        self._of_cut = [self._distance(*pair) for pair in zip(self._wanted, found, strict=True)]

    def compare(self, pruned: IsoPruneForImageClassification) -> Divergences:
        """Compute the divergences of a cut network at all scales; there must be images."""
        found = _logits(pruned, self._calibration)
        total = torch.zeros(len(pruned.config.id2label or {}), dtype=torch.float64)  # a rank may have no images
        if self._divergence is not None:
            total = self._sum(sum((logits.sum(0) for logits in found), start=total), pruned.device)
        center = total / self.images
        sums = torch.zeros(3, len(SCALES), dtype=torch.float64)
        nearer = torch.zeros((), dtype=torch.int64)
        for wanted, before, logits in zip(self._wanted, self._of_cut, found, strict=True):
            scaled, squares = self._distances(wanted, logits, center)
            plain = scaled[_PLAIN]
            sums += torch.stack([scaled.sum(1), (plain - scaled).square().sum(1), squares.sum(1)])
            nearer += (plain <= before + NEGLIGIBLE).sum()
        return Divergences(self._sum(sums, pruned.device), total, self.images, int(self._sum(nearer, pruned.device)))

    def _distances(self, wanted: torch.Tensor, logits: torch.Tensor, center: torch.Tensor) -> torch.Tensor:
        """Compute the distances of outputs (B, N) from the dense ones at all scales, and squared: (2, scales, B)."""
        found = torch.full((2, len(SCALES), len(wanted)), torch.inf, dtype=torch.float64)
        for index, scale in enumerate(SCALES if self._divergence is not None else ()):
            outputs = center + scale * (logits - center)
            found[:, index] = torch.stack([self._distance(wanted, outputs), (wanted - outputs).square().sum(-1)])
        if self._divergence is None:
            found[:, _PLAIN] = torch.stack([self._distance(wanted, logits), (wanted - logits).square().sum(-1)])
        return found

    def _distance(self, wanted: torch.Tensor, found: torch.Tensor) -> torch.Tensor:
        """Compute the distance of each output (B, N) from the dense one: (B,)."""
        if self._divergence is not None:
            return self._divergence(wanted, found)
        return (wanted - found).square().sum(-1) / max(self._size, torch.finfo(torch.float64).tiny)

    def _sum(self, values: torch.Tensor, device: torch.device) -> torch.Tensor:
        """Return the sum over all ranks, on the CPU."""
        return sum_over_ranks(values.to(device), self._calibration.accelerator).cpu()


def judge(parts: Sequence[Divergences], *, is_repaired: bool = True) -> Judgement:
    """Return the divergence of a cut network over all images that it was compared on, and its best scale.

    The parts of few images are two halves (`split_images`). Their divergence may be least far from the dense logits,
    so only scales at which the squared distance is not larger than at scale 1 are compared; and the logits of a cut
    without a repair are not scaled, as no ridge has pulled them anywhere.
    """
    images = sum(part.images for part in parts)
    sums, logits = (sum(values) / images for values in zip(*((part.sums, part.logits) for part in parts), strict=True))
    means, squares, distances = sums.nan_to_num(nan=torch.inf)
    if len(parts) > 1:
        is_nearer = distances <= distances[_PLAIN] if is_repaired else torch.tensor(SCALES) == 1
        means = means.where(is_nearer, torch.inf)
    best = int(means.argmin())
    gain = float(means[_PLAIN] - means[best])
    error = max(float(squares[best]) - gain**2, 0.0) / max(images - 1, 1)  # squared, of the mean gain
    best = best if gain > max(error**0.5, NEGLIGIBLE) else _PLAIN
    nearer = sum(part.nearer for part in parts)
    return Judgement(float(means[best]), SCALES[best], logits, nearer, float(distances[_PLAIN]))


def _logits(model: IsoPruneForImageClassification, calibration: Calibration) -> list[torch.Tensor]:
    """Compute the logits of each micro-batch, in float64 on the CPU."""
    total = length_hint(calibration.batches) or None
    batches = with_progress(calibration.batches, "repair, comparison", "batch", rank=calibration.rank, total=total)
    with scoring_mode(model, requires_grad=False), torch.no_grad():
        return [model(pixel_values=images.to(model.device)).logits.double().cpu() for images, _ in batches]
