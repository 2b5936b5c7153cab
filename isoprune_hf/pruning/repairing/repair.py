"""Repair a cut model without training (`repair`): the attention scale first, then the repair that was requested."""

from collections.abc import Sequence

from isoprune_hf.checkpoint.modeling_isoprune import IsoPruneForImageClassification
from isoprune_hf.errors import RecipeError
from isoprune_hf.pruning.calibration.calibration import Calibration
from isoprune_hf.pruning.cutting.cut import keep_masks
from isoprune_hf.pruning.groups import CoupledGroup
from isoprune_hf.pruning.plan import PruningPlan
from isoprune_hf.pruning.repairing.attention_scale import keep_scale
from isoprune_hf.pruning.repairing.repairs.registry import REPAIRS
from isoprune_hf.pruning.repairing.repairs.task import RepairTask
from isoprune_hf.pruning.repairing.rotation import Rotated


def repair(
    rotated: Rotated,
    pruned: IsoPruneForImageClassification,
    plan: PruningPlan,
    groups: Sequence[CoupledGroup],
    name: str,
    calibration: Calibration | None = None,
) -> tuple[str, ...]:
    """Repair a cut model, in place.

    Args:
        rotated: The model that was cut, with the heads that were rotated before.
        pruned: The cut model.
        plan: What was kept.
        groups: Groups of the base.
        name: The repair: a key of `REPAIRS`.
        calibration: Images, for repairs that read them; iterated over as often as the model has layers.

    Returns:
        One line for each thing that could not be repaired.

    Raises:
        RecipeError: The repair reads images, and there is none.
    """
    factors = keep_scale(rotated, pruned, plan, groups)
    method = REPAIRS[name]
    if not method.reads_images or not (plan.kept or plan.removed_blocks):
        return ()
    if calibration is None:
        raise RecipeError("prune.reconstruct needs data: give --data.dataset, or leave it out")
    masks = keep_masks(plan, groups, rotated.model.model)
    return method.repair(RepairTask(rotated.model, pruned, masks, factors, calibration))
