"""`gate_fisher` and `gate_fisher_joint`: the loss that the removal of a channel costs, in nats.

With g_n the derivative of the loss of image n by a gate that multiplies every use of a channel, E[g_n^2] / 2 is the
loss that removing the channel costs, to second order, with the Fisher information instead of the Hessian. The joint
variant also counts the products E[g_n g_n^T] with all channels of the group that are cheaper.

Source:
    Theis et al., Faster gaze prediction with dense networks and Fisher pruning, 2018.
"""

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np
import torch

from isoprune_hf.checkpoint.modeling_isoprune import IsoPruneForImageClassification
from isoprune_hf.pruning.calibration.calibration import Batch, Calibration
from isoprune_hf.pruning.calibration.gradients import IMAGES, require_images, sum_over_ranks, zero_images
from isoprune_hf.pruning.calibration.resumable import remaining
from isoprune_hf.pruning.groups import CoupledGroup
from isoprune_hf.pruning.scoring.criteria.criterion import RawScores, ScoringTask
from isoprune_hf.pruning.scoring.gate_gradients import gate_gradients
from isoprune_hf.pruning.scoring.gate_points import find_gate_points
from isoprune_hf.pruning.scoring.reduction import refuse_unscored, score_each
from isoprune_hf.pruning.scoring.triangle import (
    triangle_blocks,
    triangle_column,
    triangle_diagonal,
    triangle_of_products,
)


class GateFisher:
    """E[g_n^2] / 2: every channel as if it were removed on its own."""

    name = "gate_fisher"
    reads_images = True
    in_loss_units = True

    def score(self, task: ScoringTask) -> RawScores:
        """Score all groups and blocks of a task."""
        return score_losses(task, gate_fisher(task.model, task.groups, task.calibration))


class GateFisherJoint:
    """1_S^T E[g_n g_n^T] 1_S / 2 for the set S of a channel and all cheaper ones, minus that without the channel."""

    name = "gate_fisher_joint"
    reads_images = True
    in_loss_units = True

    def score(self, task: ScoringTask) -> RawScores:
        """Score all groups and blocks of a task."""
        return score_losses(task, gate_fisher_joint(task.model, task.groups, task.calibration))


def gate_fisher(
    model: IsoPruneForImageClassification, groups: Sequence[CoupledGroup], calibration: Calibration
) -> dict[str, torch.Tensor]:
    """Compute the loss that the removal of each channel costs: E[g_n^2] / 2.

    Args:
        model: Its `model` owns the layers; its forward pass returns `logits`. Restored afterwards.
        groups: Groups of `trace_groups`.
        calibration: Images and labels; float64 sums are added up over ranks once, at the end.

    Returns:
        Group -> (channels,) in float64, in nats; without groups whose channels no layer uses.

    Raises:
        RecipeError: There is no image.
    """
    return dict(_mean_losses(model, groups, calibration, lambda gradient: gradient.square().sum(0)))


def gate_fisher_joint(
    model: IsoPruneForImageClassification, groups: Sequence[CoupledGroup], calibration: Calibration
) -> dict[str, torch.Tensor]:
    """Compute the loss that each channel costs after all channels of its group that cost less have been removed.

    Needs little more than channels^2 / 2 float64 numbers for each group. Args, Returns and Raises as in `gate_fisher`.
    """
    channels = {group.name: group.channels for group in groups}
    losses = _mean_losses(model, groups, calibration, triangle_of_products)
    return {name: remove_in_turn(loss, channels[name]) for name, loss in losses}


def remove_in_turn(losses: torch.Tensor, channels: int) -> torch.Tensor:
    """Remove channels one after the other, always the currently cheapest one; return what each of them has cost.

    Removing a set S costs 1_S^T F 1_S, so channel c costs F_cc + 2 sum of F_cs over the channels s removed before it,
    and the first channels together cost the sum of their scores. A channel that costs less than one removed before it
    gets the score of that one: sorting by score reproduces the order of removal.

    Args:
        losses: F = E[g_n g_n^T] / 2 as a triangle (`triangle_of_products`), in float64.
        channels: Rows of F.

    Returns:
        (channels,) in float64; nan if losses are not finite.
    """
    if not losses.isfinite().all():
        return losses.new_full((channels,), torch.nan)
    blocks = triangle_blocks(losses.numpy(), channels)
    costs = triangle_diagonal(blocks)
    scores = np.zeros(channels)
    highest = 0.0
    for _ in range(channels):
        cheapest = int(costs.argmin())
        highest = max(highest, costs[cheapest])
        scores[cheapest] = highest
        costs += 2 * triangle_column(blocks, cheapest)
        costs[cheapest] = np.inf
    return torch.from_numpy(scores)


def score_losses(task: ScoringTask, losses: Mapping[str, torch.Tensor]) -> RawScores:
    """Return the losses of all groups as scores; groups without losses have none."""

    def score(group: CoupledGroup) -> torch.Tensor:
        if group.name not in losses:
            refuse_unscored(task, group.name, "layer that reads or writes its channels")
        return losses[group.name]

    return score_each(task, score)


def _mean_losses(
    model: IsoPruneForImageClassification,
    groups: Sequence[CoupledGroup],
    calibration: Calibration,
    square: Callable[[torch.Tensor], torch.Tensor],
) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield each group with half the mean over all images of a square of its gate gradients, on the CPU.

    The sums of all groups are held during the passes over the images; afterwards each is divided in place and released
    before the next one, so that there is no second set of them.

    Args:
        model: The model.
        groups: Groups of `trace_groups`.
        calibration: Images and labels.
        square: Turns gradients (B, channels) of a micro-batch into a sum over its images.
    """
    points, factors = find_gate_points(model, groups)
    if not points:
        return
    images = zero_images(model)
    sums: dict[str, torch.Tensor] = {}

    def left() -> Iterator[Batch]:
        """Create the sums when the first batch is asked for: the choice of the way needs as much memory before it."""
        none = torch.zeros(0, dtype=torch.float64, device=model.device)
        sums.update({group.name: square(none.view(0, group.channels)) for group in groups if group.name in factors})
        yield from remaining({**sums, IMAGES: images}, calibration)

    # A resumed scoring chooses between the two ways of `gate_gradients` by the same images as the interrupted one.
    is_once = isinstance(calibration.batches, Iterator)
    probe = None if is_once else list(itertools.islice(iter(calibration.batches), 1))
    for gradients, labels in gate_gradients(model, points, left(), calibration.precision, probe):
        totals: dict[str, torch.Tensor] = {}
        for point, gradient in zip(points, gradients, strict=True):
            part = factors[point.group] * gradient.double().sum(2)
            totals[point.group] = totals[point.group] + part if point.group in totals else part
        for name, total in totals.items():
            sums[name].add_(square(total))
        images += len(labels)
    count = sum_over_ranks(images, calibration.accelerator)
    require_images(count)
    for name in list(sums):
        yield name, sum_over_ranks(sums.pop(name), calibration.accelerator).div_(2 * count).cpu()
