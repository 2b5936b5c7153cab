"""Prune any module in one call: `prune`."""

import dataclasses
from collections.abc import Iterable
from typing import Any

from torch import nn

from isoprune_hf.api.batches import InputKeys, read_batches
from isoprune_hf.api.holding import count_hooks, hold, unwrap
from isoprune_hf.api.objectives import Loss
from isoprune_hf.api.pruned import Pruned
from isoprune_hf.api.random_state import kept_random_state
from isoprune_hf.errors import RecipeError
from isoprune_hf.models.calling import restore
from isoprune_hf.pruning.prune import prune_model
from isoprune_hf.recipes import PruneRecipe
from isoprune_hf.recipes.prune import BUDGETS, DATA_CRITERIA

_LOSS_READERS = {*DATA_CRITERIA} - {"activation_variance"}
_RATIOS = ("ratio", "head_ratio", "head_dim_ratio", "ratios", "remove_blocks", "preset")


def prune(
    model: nn.Module,
    data: Iterable[Any] | None = None,
    *,
    loss: Loss | None = None,
    inputs: InputKeys | None = None,
    target_macs: str | int | float | None = None,
    **settings: Any,
) -> Pruned:
    """Prune a module to a budget; neither the module nor any state of the caller changes.

    Args:
        model: Any module. The one inside DataParallel, DistributedDataParallel and `torch.compile` is taken.
        data: Batches for scores and repair, as in the caller's own training loop: a loader, or anything else that
            gives tuples (inputs, targets), dicts with `pixel_values` or `image` and `labels` or `label`, or tensors.
            A tensor is one batch, and a data set of torch is loaded in its order. The first `calibration_batches *
            batch_size` samples are read, once. For a criterion of weights only, such as l1, an example is enough.
        loss: `loss(outputs, batch)` returns the mean over the samples or one value for each sample, where `batch` has
            the form of the data and any number of samples; or cross_entropy, binary_cross_entropy or squared_error.
            By default the one of these that the targets fit. Data without targets are scored on the classes that the
            model itself predicts, or, if its outputs are no (B, classes), on the squares of its outputs.
        inputs: Positions or names of the entries of a batch that the model takes, if there are several; names are
            passed as keywords.
        target_macs: 4.2G, 350M, or a share of the base. Without this, another budget, ratios or a preset: 50%.
        **settings: Settings of `PruneRecipe`, such as `target_params`, `criterion`, `exclude` or `round_to`.

    Returns:
        The pruned module, of the same type and in eval mode, with its plan and costs.

    Raises:
        RecipeError: A setting or the loss does not fit; see also `prune_model`.
        BudgetError: The budget cannot be reached.
        DatasetError: The data have another form, or the targets do not fit the outputs.
        UnsupportedArchitectureError: The module cannot be cut, or does not run on the first batch.
    """
    recipe = _read_recipe(target_macs, settings)
    module = unwrap(model)
    if data is None:
        raise RecipeError(
            "data is not set: pass batches such as a DataLoader; a criterion of weights only, such as criterion='l1', "
            "needs one tensor of example inputs"
        )
    samples = recipe.calibration_batches * recipe.batch_size
    reads_targets = loss is not None or recipe.criterion in _LOSS_READERS
    with kept_random_state():
        batches = read_batches(data, samples=samples, batch_size=recipe.batch_size, keys=inputs)
        held = hold(module, batches, loss, reads_targets=reads_targets)
        result = prune_model(held.model, recipe, [*map(held.read, batches)] if recipe.reads_images else None)
    pruned = result.model.model
    restore(pruned)
    plan = dataclasses.replace(result.plan, notes=(*result.plan.notes, *_note_hooks(module, pruned)))
    name = held.model.objective.name if reads_targets else None
    return Pruned(
        pruned, plan, result.scores, result.groups, result.base_cost, result.pruned_cost, result.seconds, name
    )


def _note_hooks(module: nn.Module, pruned: nn.Module) -> tuple[str, ...]:
    left = count_hooks(module) - count_hooks(pruned)
    return (f"hooks left out: {left}, which do not belong to the model itself",) if left > 0 else ()


def _read_recipe(target_macs: str | int | float | None, settings: dict[str, Any]) -> PruneRecipe:
    """Return the recipe of the settings, with a budget of half of the MACs if they name none."""
    is_free = not any(settings.get(name) is not None for name in (*BUDGETS, *_RATIOS))
    try:
        return PruneRecipe(target_macs="50%" if target_macs is None and is_free else target_macs, **settings)
    except TypeError as error:  # an unknown setting
        raise RecipeError(f"prune: {str(error).partition('() ')[2]}; see PruneRecipe for the settings") from error
