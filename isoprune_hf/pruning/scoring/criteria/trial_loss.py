"""`trial_loss`: the loss that the removal of a channel costs after a repair, from trial cuts of each group.

`gate_fisher_joint` estimates the loss before a repair, to second order. Here its order of removal is kept, and the
losses of a group are corrected by those of a few cuts of this group that are measured (see `trial_cuts`): with c(f)
the loss that it estimates for the first fraction f of the channels, and m the measured divergence at some fractions,

    corrected c(f) = c(f) r(f),    r = m / c at these fractions, and interpolated between them (its logarithm).

A score is the increase of the corrected loss by one more channel. The loss is replaced by its lower convex hull, so
that scores ascend in the order of removal.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np
import torch

from isoprune_hf.models.held import objective_of
from isoprune_hf.pruning.groups import CoupledGroup
from isoprune_hf.pruning.scoring.criteria.criterion import RawScores, ScoringTask
from isoprune_hf.pruning.scoring.criteria.gate_fisher import gate_fisher_joint, score_losses
from isoprune_hf.pruning.scoring.gate_points import find_gate_points
from isoprune_hf.pruning.scoring.trial_cuts import TrialCut, measure_trial_cuts

FRACTIONS = (0.25, 0.5, 0.75)  # of the channels of a group that its trial cuts remove
_MAX_RATIO = 1e3  # of a measured loss to an estimated one, and its inverse the smallest
_STEP = 2e-7  # relative; keeps the order of removal where the hull is straight, in float32


class TrialLoss:
    """The losses of `gate_fisher_joint`, corrected by those of trial cuts.

    A model whose outputs are no logits of classes, and a group that cannot be measured, keep those of
    `gate_fisher_joint`.
    """

    name = "trial_loss"
    reads_images = True
    in_loss_units = True

    def score(self, task: ScoringTask) -> RawScores:
        """Score all groups and blocks of a task."""
        batches = task.calibration.batches
        several = replace(task.calibration, batches=list(batches) if isinstance(batches, Iterator) else batches)
        losses = gate_fisher_joint(task.model, task.groups, several)
        if not objective_of(task.model).compares_classes:
            return score_losses(task, losses)
        groups = [group for group in task.groups if group.name in losses and losses[group.name].isfinite().all()]
        cuts = {group.name: _trial_cuts(group, losses[group.name].numpy()) for group in groups}
        points, _ = find_gate_points(task.model, groups)
        flat = [cut for own in cuts.values() for cut in own]
        measured = iter(measure_trial_cuts(task.model, points, flat, several))
        for group in groups:
            found = [(cut.removed, next(measured)) for cut in cuts[group.name]]
            known = [(removed, divergence) for removed, divergence in found if divergence is not None]
            scores = correct_losses(losses[group.name].numpy(), known, max(group.num_heads, 1))
            losses[group.name] = torch.from_numpy(scores)
        return score_losses(task, losses)


def correct_losses(losses: np.ndarray, measured: Sequence[tuple[np.ndarray, float]], heads: int = 1) -> np.ndarray:
    """Correct the losses of the channels of a group, see the module.

    Args:
        losses: Loss of each channel after all cheaper ones of its head: (channels,).
        measured: Removed channels of each cut, and the loss that was measured.
        heads: Heads of equal size; the channels of each one are removed in their own order.

    Returns:
        (channels,); without measured losses those that were given.
    """
    ratios = {
        len(removed) / len(losses): np.clip(loss / losses[removed].sum(), 1 / _MAX_RATIO, _MAX_RATIO)
        for removed, loss in measured
        if losses[removed].sum() > 0 and np.isfinite(loss)
    }
    if not ratios:
        return losses
    by_head = losses.reshape(heads, -1)
    size = by_head.shape[1]
    known = sorted(ratios)
    logarithms = np.interp(np.arange(size + 1) / size, known, [np.log(ratios[fraction]) for fraction in known])
    corrected = np.empty_like(by_head)
    for scores, own in zip(corrected, by_head, strict=True):
        order = own.argsort(kind="stable")
        total = np.concatenate([[0.0], own[order].cumsum()]) * np.exp(logarithms)
        scores[order] = _ascending(np.diff(total).clip(min=0)) * (1 + _STEP * np.arange(size))
    return corrected.reshape(-1)


def _ascending(values: np.ndarray) -> np.ndarray:
    """Return the ascending numbers nearest to values: runs that descend get their mean (isotonic regression)."""
    means: list[float] = []
    counts: list[int] = []
    for value in values.tolist():
        mean, count = value, 1
        while means and means[-1] >= mean:
            mean = (means[-1] * counts[-1] + mean * count) / (counts[-1] + count)
            count += counts.pop()
            means.pop()
        means.append(mean)
        counts.append(count)
    return np.repeat(means, counts)


def _trial_cuts(group: CoupledGroup, losses: np.ndarray) -> list[TrialCut]:
    """Return the trial cuts of a group: its cheapest channels, or those of each head."""
    by_head = losses.reshape(max(group.num_heads, 1), -1)
    order = by_head.argsort(axis=1, kind="stable")
    size = by_head.shape[1]
    counts = sorted({round(fraction * size) for fraction in FRACTIONS} - {0, size})
    starts = np.arange(len(by_head))[:, None] * size
    return [TrialCut(group.name, np.sort((order[:, :count] + starts).ravel())) for count in counts]
