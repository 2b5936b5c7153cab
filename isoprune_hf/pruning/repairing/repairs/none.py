"""`none`: leave the model as it was cut."""

from isoprune_hf.pruning.repairing.repairs.task import RepairTask


class NoRepair:
    """Change nothing."""

    name = "none"
    reads_images = False

    def repair(self, task: RepairTask) -> tuple[str, ...]:
        """Return no lines."""
        return ()
