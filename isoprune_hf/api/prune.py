"""Prune any module in one call: `prune`."""

import dataclasses
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from isoprune_hf.api.batches import CallerBatch, read_batches
from isoprune_hf.api.holding import count_hooks, hold, unwrap
from isoprune_hf.api.pruned import Pruned
from isoprune_hf.api.random_state import kept_random_state
from isoprune_hf.errors import DatasetError, RecipeError
from isoprune_hf.models.held import CLASSES
from isoprune_hf.pruning.calibration.calibration import Batch
from isoprune_hf.pruning.prune import prune_model
from isoprune_hf.recipes import PruneRecipe
from isoprune_hf.recipes.prune import BUDGETS

_RATIOS = ("ratio", "head_ratio", "head_dim_ratio", "ratios", "remove_blocks", "preset")


def prune(
    model: nn.Module,
    data: Iterable[Any] | None = None,
    *,
    target_macs: str | int | float | None = None,
    **settings: Any,
) -> Pruned:
    """Prune a module to a budget; neither the module nor any state of the caller changes.

    Args:
        model: Any module that takes one tensor (B, ...) and returns logits (B, classes). The module inside
            DataParallel, DistributedDataParallel and `torch.compile` is taken.
        data: Batches of inputs and targets for scores and repair: a loader or a list, of tuples, dicts or tensors; the
            first `calibration_batches * batch_size` samples are read, once. For a criterion of weights only, such as
            l1, one tensor with an example is enough.
        target_macs: 4.2G, 350M, or a share of the base. Without this, another budget, ratios or a preset: 50%.
        **settings: Settings of `PruneRecipe`, such as `target_params`, `criterion`, `exclude` or `round_to`.

    Returns:
        The pruned module, of the same type and in eval mode, with its plan and costs.

    Raises:
        RecipeError, BudgetError, DatasetError, UnsupportedArchitectureError: See `prune_model` and `PruneRecipe`.
    """
    recipe = _read_recipe(target_macs, settings)
    module = unwrap(model)
    if data is None:
        raise RecipeError(
            "data is not set: pass batches such as a DataLoader; a criterion of weights only, such as criterion='l1', "
            "needs one tensor of example inputs"
        )
    with kept_random_state():
        read = read_batches(data, samples=recipe.calibration_batches * recipe.batch_size, batch_size=recipe.batch_size)
        batches = [_labelled(batch) for batch in read] if recipe.reads_images else None
        held = hold(module, read[0].inputs[0], CLASSES)
        result = prune_model(held, recipe, batches)
    pruned = result.model.model
    left = count_hooks(module) - count_hooks(pruned)
    notes = (f"hooks left out: {left}, which do not belong to the model itself",) if left else ()
    plan = dataclasses.replace(result.plan, notes=(*result.plan.notes, *notes))
    return Pruned(pruned, dataclasses.replace(result, plan=plan))


def _read_recipe(target_macs: str | int | float | None, settings: dict[str, Any]) -> PruneRecipe:
    """Return the recipe of the settings, with a budget of half of the MACs if they name none."""
    is_free = not any(settings.get(name) is not None for name in (*BUDGETS, *_RATIOS))
    try:
        return PruneRecipe(target_macs="50%" if target_macs is None and is_free else target_macs, **settings)
    except TypeError as error:  # an unknown setting
        raise RecipeError(f"prune: {str(error).partition('() ')[2]}; see PruneRecipe for the settings") from error


def _labelled(batch: CallerBatch) -> Batch:
    """Return inputs and classes of a batch.

    Raises:
        DatasetError: It has no classes.
    """
    if not isinstance(batch.targets, torch.Tensor) or batch.targets.is_floating_point():
        raise DatasetError("data: a batch has no labels; pass tuples (inputs, labels) or dicts with the entry labels")
    return batch.inputs[0], batch.targets
