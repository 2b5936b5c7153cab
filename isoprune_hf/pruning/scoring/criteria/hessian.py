"""`hessian`: second-order change of the loss if a weight becomes zero, with the diagonal of the empirical Fisher."""

from isoprune_hf.pruning.scoring.criteria.criterion import RawScores, ScoringTask
from isoprune_hf.pruning.scoring.fisher import mean_squared_gradients
from isoprune_hf.pruning.scoring.reduction import score_elements


class Hessian:
    """v = w^2 E[g_n^2], summed, where g_n is the gradient of the loss of image n.

    Source:
        Le Cun et al., Optimal Brain Damage, NeurIPS 1989, without its factor 1/2.
    """

    name = "hessian"
    reads_images = True
    in_loss_units = False

    def score(self, task: ScoringTask) -> RawScores:
        """Score all groups and blocks of a task."""
        squares = mean_squared_gradients(task.model, task.weights, task.calibration)
        values = {name: weight.square() * squares.pop(name) for name, weight in task.weights.items()}
        return score_elements(task, values, "sum")
