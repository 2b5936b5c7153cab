"""`least_squares`: bring the outputs of every layer nearest to those of the dense one."""

from isoprune_hf.pruning.repairing.fit_layers import fit_layers
from isoprune_hf.pruning.repairing.repairs.task import RepairTask


class LeastSquaresRepair:
    """Fit weights and biases of layers (see `fit_layers`).

    Source:
        He et al., Channel Pruning for Accelerating Very Deep Neural Networks, ICCV 2017, without the ridge.
    """

    name = "least_squares"
    reads_images = True

    def repair(self, task: RepairTask) -> tuple[str, ...]:
        """Repair `task.pruned`, in place."""
        return fit_layers(
            task.dense, task.pruned, task.masks, task.calibration, outputs=task.outputs, factors=task.factors
        )
