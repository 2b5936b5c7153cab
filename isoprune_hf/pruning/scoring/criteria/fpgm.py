"""`fpgm`: the distance of a filter to all other filters of its layer."""

import torch
from torch import nn

from isoprune_hf.pruning.graph.layers import ConvNd, ConvTransposeNd
from isoprune_hf.pruning.groups import CoupledGroup
from isoprune_hf.pruning.scoring.criteria.criterion import RawScores, ScoringTask
from isoprune_hf.pruning.scoring.reduction import combine_members, positions, score_each


class GeometricMedian:
    """Distance to all other filters.

    s_m(c) = sum over c' of ||F_m(c) - F_m(c')||_2 for every member m that writes the channels: a weight of a linear
    or convolution with the channels on its output side. F_m(c) are all its elements of the channel: for attention
    with fused projections, the rows of query, key and value in one. torch-pruning 1.6.1 squares the elements before
    it computes distances, and scores input sides, too; the paper does neither.

    Source:
        He et al., Filter Pruning via Geometric Median, CVPR 2019.
    """

    name = "fpgm"
    reads_images = False
    in_loss_units = False

    def score(self, task: ScoringTask) -> RawScores:
        """Score all groups and blocks of a task."""
        missing = "weight that writes its channels"
        return score_each(task, lambda group: combine_members(task, group.name, _distances(task, group), missing))


def _distances(task: ScoringTask, group: CoupledGroup) -> list[torch.Tensor]:
    """Compute s_m of each member that writes the channels: (channels,) in float64."""
    parts = []
    for member in group.members:
        name, _, leaf = member.parameter.rpartition(".")
        layer = task.model.model.get_submodule(name)
        if leaf == "weight" and isinstance(layer, (nn.Linear, ConvNd)):
            is_transposed = isinstance(layer, ConvTransposeNd)
            if member.dim == int(is_transposed):
                rows = task.weights[member.parameter].double().movedim(member.dim, 0)
                filters = rows[positions(member.index).to(rows.device)].flatten(1)
                parts.append(torch.cdist(filters, filters).sum(1).cpu())
    return parts
