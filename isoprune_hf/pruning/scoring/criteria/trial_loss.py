"""`trial_loss`: the loss that the removal of a channel costs after a repair, from trial cuts of each group.

`gate_fisher_joint` estimates the loss before a repair, to second order. Here its order of removal is kept, and the
losses of a group are corrected by those of a few measured cuts of this group (see `measure_trial_cuts`): with c(f)
the loss that it estimates for the first fraction f of the channels, and m the measured divergence at some fractions,

    corrected c(f) = c(f) r(f),    r = m / c at these fractions, and interpolated between them (its logarithm).

A score is the increase of the corrected loss by one more channel. The loss is replaced by its lower convex hull, so
that scores ascend in the order of removal.
"""

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

import numpy as np
import torch

from isoprune_hf.checkpoint.modeling_isoprune import IsoPruneForImageClassification
from isoprune_hf.models.held import objective_of
from isoprune_hf.pruning.groups import CoupledGroup
from isoprune_hf.pruning.scoring import trial_cuts
from isoprune_hf.pruning.scoring.criteria.criterion import RawScores, ScoringTask
from isoprune_hf.pruning.scoring.criteria.gate_fisher import gate_fisher_joint, score_losses
from isoprune_hf.pruning.scoring.gate_points import find_gate_points
from isoprune_hf.pruning.scoring.reduction import score_elements
from isoprune_hf.pruning.scoring.trial_cuts import TrialCut

logger = logging.getLogger(__name__)
FRACTIONS = (0.25, 0.5, 0.75)  # of the channels of a group that its trial cuts remove
_MAX_RATIO = 1e3  # of a measured loss to an estimated one, and its inverse the smallest
_NAMED = 3  # groups in a message
_STEP = 2e-7  # relative; keeps the order of removal where the hull is straight, in float32


class TrialLoss:
    """The losses of `gate_fisher_joint`, corrected by those of trial cuts.

    Groups without gradients, as behind `torch.no_grad` or a saturated softmax, have other losses before the trials,
    see `losses_of_weights`.

    A group that is not measured is corrected like others (`spread_ratios`). A model whose outputs are no logits of
    classes, or of which no cut can be measured, keeps the losses of `gate_fisher_joint`.
    """

    name = "trial_loss"
    reads_images = True
    in_loss_units = True

    def score(self, task: ScoringTask) -> RawScores:
        """Score all groups and blocks of a task."""
        batches = task.calibration.batches
        several = replace(task.calibration, batches=list(batches) if isinstance(batches, Iterator) else batches)
        losses = gate_fisher_joint(task.model, task.groups, several)
        losses |= losses_of_weights(task, losses)
        if objective_of(task.model).divergence is None:
            return score_losses(task, losses)
        groups = [group for group in task.groups if group.name in losses and losses[group.name].isfinite().all()]
        known = {group.name: losses[group.name].numpy() for group in groups}
        candidates = {group.name: _trial_cuts(group, known[group.name]) for group in _by_class(groups)}
        points, _ = find_gate_points(task.model, groups)
        measured = trial_cuts.measure_trial_cuts(task.model, points, candidates, several)
        ratios = {
            name: ratios_of(known[name], [(cut.removed, divergence) for cut, divergence in found])
            for name, found in measured.items()
        }
        for group, own in zip(groups, spread_ratios(groups, ratios), strict=True):
            scores = correct_losses(known[group.name], own, max(group.num_heads, 1))
            losses[group.name] = torch.from_numpy(scores)
        return score_losses(task, losses)


def losses_of_weights(task: ScoringTask, losses: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return losses for groups in which all are zero: the channels differ by the sums of their absolute weights.

    The loss of all channels together is that of the mean of the other groups, and 1 nat without others: trial cuts
    correct it, of a model whose outputs have probabilities.

    Args:
        task: Its weights are read.
        losses: Group -> loss of each channel.
    """
    silent = [group for group in task.groups if group.name in losses and not losses[group.name].any()]
    if not silent:
        return {}
    names = ", ".join(group.name for group in silent[:_NAMED])
    logger.warning("no gradient of the loss reaches %d groups (%s): ranked by weights", len(silent), names)
    found = score_elements(replace(task, groups=silent, blocks=()), task.weights, "sum").groups
    totals = [float(loss.sum()) for loss in losses.values() if loss.any() and loss.isfinite().all()]
    mean = sum(totals) / len(totals) if totals else 1.0
    return {name: mean * magnitudes / magnitudes.sum() for name, magnitudes in found.items() if magnitudes.any()}


def ratios_of(losses: np.ndarray, measured: Sequence[tuple[np.ndarray, float]]) -> np.ndarray | None:
    """Compute the logarithms of the ratios of measured to estimated losses at `FRACTIONS`.

    Args:
        losses: Loss of each channel after all cheaper ones of its head: (channels,).
        measured: Removed channels of each cut, and the loss that was measured.

    Returns:
        (fractions,), interpolated; None without a measured loss, or if the estimated ones are zero.
    """
    found = {
        len(removed) / len(losses): np.log(np.clip(loss / losses[removed].sum(), 1 / _MAX_RATIO, _MAX_RATIO))
        for removed, loss in measured
        if losses[removed].sum() > 0 and np.isfinite(loss)
    }
    if not found:
        return None
    fractions = sorted(found)
    return np.asarray(np.interp(FRACTIONS, fractions, [found[fraction] for fraction in fractions]))


def spread_ratios(groups: Sequence[CoupledGroup], measured: Mapping[str, np.ndarray | None]) -> list[np.ndarray]:
    """Return the logarithms of the ratios of all groups.

    A group without measured ones gets those of the groups of its class, interpolated between the nearest ones, or the
    means of all groups of other classes; without any they are zero.

    Args:
        groups: Groups in the order of the network.
        measured: Group -> its ratios, see `ratios_of`.
    """
    known = {name: ratios for name, ratios in measured.items() if ratios is not None}
    mean = np.mean([*known.values()], axis=0) if known else np.zeros(len(FRACTIONS))
    places: dict[str, list[int]] = {}
    for place, group in enumerate(groups):
        if group.name in known:
            places.setdefault(group.signature, []).append(place)
    spread = []
    for place, group in enumerate(groups):
        near = places.get(group.signature, [])
        columns = zip(*(known[groups[other].name] for other in near), strict=True)
        spread.append(np.array([np.interp(place, near, column) for column in columns]) if near else mean)
    return spread


def correct_losses(losses: np.ndarray, ratios: np.ndarray, heads: int = 1) -> np.ndarray:
    """Correct the losses of the channels of a group, see the module.

    Args:
        losses: Loss of each channel after all cheaper ones of its head: (channels,).
        ratios: Logarithms of the ratios at `FRACTIONS`.
        heads: Heads of equal size; the channels of each one are removed in their own order.

    Returns:
        (channels,); the given ones if all ratios are 1.
    """
    if not ratios.any():
        return losses
    by_head = losses.reshape(heads, -1)
    size = by_head.shape[1]
    logarithms = np.interp(np.arange(size + 1) / size, FRACTIONS, ratios)
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


def foretell_passes(
    model: IsoPruneForImageClassification, groups: Sequence[CoupledGroup], *, images: int, batch_size: int
) -> float:
    """Return the passes over all images of the trial cuts of groups, beside those of `gate_fisher_joint`."""
    points, _ = find_gate_points(model, groups)
    candidates = {group.name: _counts(group) for group in _by_class(groups)}
    return trial_cuts.foretell_passes(model, points, candidates, images=images, batch_size=batch_size)


def _by_class(groups: Sequence[CoupledGroup]) -> list[CoupledGroup]:
    """Sort groups so that those of a class are neighbours."""
    return sorted(groups, key=lambda group: group.signature)


def _counts(group: CoupledGroup) -> list[int]:
    """Return the numbers of channels that trial cuts of a group remove, or of each head."""
    size = group.channels // max(group.num_heads, 1)
    return sorted({round(fraction * size) for fraction in FRACTIONS} - {0, size})


def _trial_cuts(group: CoupledGroup, losses: np.ndarray) -> list[TrialCut]:
    """Return the trial cuts of a group: its cheapest channels, or those of each head."""
    by_head = losses.reshape(max(group.num_heads, 1), -1)
    order = by_head.argsort(axis=1, kind="stable")
    starts = np.arange(len(by_head))[:, None] * by_head.shape[1]
    return [TrialCut(group.name, np.sort((order[:, :count] + starts).ravel())) for count in _counts(group)]
