"""What a user may ask for: frozen dataclasses, one for each section of a recipe file, with their range checks."""

from isoprune_hf.recipes.budget import Budget, BudgetKind
from isoprune_hf.recipes.data import DataRecipe
from isoprune_hf.recipes.finetune import FinetuneRecipe, PretrainRecipe
from isoprune_hf.recipes.prune import BUDGETS, DATA_CRITERIA, Criterion, PruneRecipe
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
