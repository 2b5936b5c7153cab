"""`bias`: give every layer the mean outputs of the dense one."""

from isoprune_hf.pruning.repairing.fit_layers import fit_layers
from isoprune_hf.pruning.repairing.repairs.task import RepairTask


class BiasRepair:
    """Fit only the biases of layers (see `fit_layers`)."""

    name = "bias"
    reads_images = True

    def repair(self, task: RepairTask) -> tuple[str, ...]:
        """Repair `task.pruned`, in place."""
        return fit_layers(
            task.dense,
            task.pruned,
            task.masks,
            task.calibration,
            outputs=task.outputs,
            factors=task.factors,
            is_bias_only=True,
            selecting=task.selecting,
        )
