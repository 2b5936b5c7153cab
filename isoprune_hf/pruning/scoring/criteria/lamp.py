"""`lamp`: the share of a channel in the norm of all channels that are at least as large."""

import torch

from isoprune_hf.pruning.groups import CoupledGroup
from isoprune_hf.pruning.scoring.criteria.criterion import RawScores, ScoringTask
from isoprune_hf.pruning.scoring.reduction import reduce_members, score_each, sum_along


class Lamp:
    """Squared L2 norm divided by that of all channels of the group that are at least as large.

    score(c) = ||c||^2 / sum of ||c'||^2 over c' with ||c'|| >= ||c||; the largest has 1. LAMP scores single weights;
    channels of a group are scored as in torch-pruning 1.6.1 (`GroupMagnitudeImportance._lamp`), but over all
    parameters of the channel, biases included. `reduction` has no effect: a factor cancels.

    Source:
        Lee et al., LAMP, ICLR 2021.
    """

    name = "lamp"
    reads_images = False
    in_loss_units = False

    def score(self, task: ScoringTask) -> RawScores:
        """Score all groups and blocks of a task."""
        sums = sum_along(task, task.weights, "channel")

        def score(group: CoupledGroup) -> torch.Tensor:
            squares = reduce_members(task, group, sums, "channel").square()
            ordered, order = squares.sort(stable=True)
            rest = ordered.flip(0).cumsum(0).flip(0)[torch.searchsorted(ordered, ordered)]  # equal norms share it
            return torch.zeros_like(squares).scatter(0, order, ordered / rest.where(rest > 0, 1))

        return score_each(task, score)
