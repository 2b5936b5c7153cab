"""`taylor` and `taylor_l2`: first-order change of the loss if a weight becomes zero."""

from dataclasses import dataclass

from isoprune_hf.pruning.calibration.gradients import mean_gradients
from isoprune_hf.pruning.scoring.criteria.criterion import RawScores, ScoringTask
from isoprune_hf.pruning.scoring.reduction import Norm, score_elements


@dataclass(frozen=True)
class Taylor:
    """v = w dL/dw, summed (`taylor`), or as the L2 norm of each slice of a parameter (`taylor_l2`).

    Source:
        Molchanov et al., Importance Estimation for Neural Network Pruning, CVPR 2019, for the sum; Fang et al.,
        Isomorphic Pruning, ECCV 2024, for the norm.
    """

    name: str
    norm: Norm
    reads_images = True
    in_loss_units = False

    def score(self, task: ScoringTask) -> RawScores:
        """Score all groups and blocks of a task."""
        gradients = mean_gradients(task.model, task.weights, task.calibration)
        values = {name: weight * gradients.pop(name) for name, weight in task.weights.items()}
        return score_elements(task, values, self.norm)


TAYLOR = Taylor("taylor", "sum")
TAYLOR_L2 = Taylor("taylor_l2", "member")
