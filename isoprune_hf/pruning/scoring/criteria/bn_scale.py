"""`bn_scale`: the scales of the BatchNorm layers of a channel."""

from isoprune_hf.errors import RecipeError
from isoprune_hf.pruning.scoring.criteria.criterion import RawScores, ScoringTask
from isoprune_hf.pruning.scoring.reduction import score_elements


class BatchNormScale:
    """v = gamma of BatchNorm, summed.

    Source:
        Liu et al., Network Slimming, ICCV 2017.
    """

    name = "bn_scale"
    reads_images = False
    in_loss_units = False

    def score(self, task: ScoringTask) -> RawScores:
        """Score all groups and blocks of a task.

        Raises:
            RecipeError: `score_batchnorm` is false.
        """
        if not task.score_batchnorm:
            raise RecipeError("criterion bn_scale scores only BatchNorm: set --prune.score_batchnorm true")
        scales = {name: task.weights[name] for name in sorted(task.batchnorm) if name.endswith(".weight")}
        return score_elements(task, scales, "sum", missing="BatchNorm")
