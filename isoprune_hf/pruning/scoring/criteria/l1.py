"""`l1`: the sum of the absolute weights of a channel."""

from isoprune_hf.pruning.scoring.criteria.criterion import RawScores, ScoringTask
from isoprune_hf.pruning.scoring.reduction import score_elements


class L1:
    """v = w, summed.

    Source:
        Li et al., Pruning Filters for Efficient ConvNets, ICLR 2017.
    """

    name = "l1"
    reads_images = False
    in_loss_units = False

    def score(self, task: ScoringTask) -> RawScores:
        """Score all groups and blocks of a task."""
        return score_elements(task, task.weights, "sum")
