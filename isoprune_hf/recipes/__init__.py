"""Recipes: frozen dataclasses with the settings of one section of a recipe file each, checked when they are made.

`PruneRecipe`, `DataRecipe` and `FinetuneRecipe` hold the settings; `PretrainRecipe` has those of `FinetuneRecipe` for
a base with random weights. `Budget` is the parsed value of `target_macs`, `target_params` or `target_latency`.
`recipe_to_dict` converts a recipe to plain values, `resume_identity` to those that a resumed run must share.

Nothing here knows models, data or the command line.
"""

from isoprune_hf.recipes.budget import Budget, BudgetKind
from isoprune_hf.recipes.data import DataRecipe
from isoprune_hf.recipes.finetune import FinetuneRecipe, PretrainRecipe
from isoprune_hf.recipes.presets import BUDGETS, DATA_CRITERIA, Criterion
from isoprune_hf.recipes.prune import PruneRecipe
from isoprune_hf.recipes.values import Interpolation, recipe_to_dict, resume_identity

__all__ = [
    "BUDGETS",
    "DATA_CRITERIA",
    "Budget",
    "BudgetKind",
    "Criterion",
    "DataRecipe",
    "FinetuneRecipe",
    "Interpolation",
    "PretrainRecipe",
    "PruneRecipe",
    "recipe_to_dict",
    "resume_identity",
]
