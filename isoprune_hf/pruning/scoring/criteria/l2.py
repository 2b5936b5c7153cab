"""`l2`: the Euclidean norm of all weights of a channel."""

from isoprune_hf.pruning.scoring.criteria.criterion import RawScores, ScoringTask
from isoprune_hf.pruning.scoring.reduction import score_elements


class L2:
    """v = w, the L2 norm of the whole channel."""

    name = "l2"
    reads_images = False
    in_loss_units = False

    def score(self, task: ScoringTask) -> RawScores:
        """Score all groups and blocks of a task."""
        return score_elements(task, task.weights, "channel")
