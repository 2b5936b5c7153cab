"""What is done to a model after the cut, without training: the scale of turned heads, statistics, fitted layers."""

from collections.abc import Sequence

from accelerate import Accelerator

from isoprune_hf.checkpoint.modeling_isoprune import IsoPruneForImageClassification
from isoprune_hf.pruning.calibration.calibration import Batches
from isoprune_hf.pruning.cutting.cut import keep_masks
from isoprune_hf.pruning.groups import CoupledGroup
from isoprune_hf.pruning.plan import PruningPlan
from isoprune_hf.pruning.repairing.attention_scale import keep_scale
from isoprune_hf.pruning.repairing.batchnorm import recalibrate_batchnorm
from isoprune_hf.pruning.repairing.reconstruct import fit_layers
from isoprune_hf.pruning.repairing.rotation import Rotated
from isoprune_hf.recipes import PruneRecipe


def repair(
    rotated: Rotated,
    pruned: IsoPruneForImageClassification,
    plan: PruningPlan,
    groups: Sequence[CoupledGroup],
    recipe: PruneRecipe,
    batches: Batches | None = None,
    accelerator: Accelerator | None = None,
) -> tuple[str, ...]:
    """Repair a cut model in place, as the recipe's `reconstruct` says.

    Args:
        rotated: What was cut.
        pruned: The cut model.
        plan: What stays.
        groups: Groups of the base.
        recipe: Its `reconstruct`.
        batches: This rank's micro-batches; gone through as often as the model has layers.
        accelerator: Ranks that share the images.

    Returns:
        Lines for what could not be repaired.

    Raises:
        RecipeError: There is no image.
    """
    factors = keep_scale(rotated, pruned, plan, groups)
    if recipe.reconstruct == "none" or not (plan.kept or plan.removed_blocks):
        return ()
    if recipe.reconstruct == "bn":
        return recalibrate_batchnorm(pruned, batches, accelerator)
    masks = keep_masks(plan, groups, rotated.model.model)
    is_bias_only = recipe.reconstruct == "bias"
    return fit_layers(rotated.model, pruned, masks, batches, accelerator, factors=factors, is_bias_only=is_bias_only)
