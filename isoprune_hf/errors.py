"""Errors that a user can mend: each says what is wrong, what was given and what is allowed, and is also a built-in."""

from isoprune_hf.checkpoint.modeling_isoprune import CheckpointError, IsoPruneError

__all__ = [
    "BudgetError",
    "CheckpointError",
    "DatasetError",
    "HubError",
    "IsoPruneError",
    "RecipeError",
    "UnsupportedArchitectureError",
]


class RecipeError(IsoPruneError, ValueError):
    """A setting is out of its range, names nothing that exists, or contradicts another."""


class BudgetError(IsoPruneError, ValueError):
    """The budget cannot be reached by the channels that may leave."""


class UnsupportedArchitectureError(IsoPruneError, ValueError):
    """The model is of a kind that cannot be pruned, or a cut would break it."""


class DatasetError(IsoPruneError, ValueError):
    """The data set is not there, has other columns, or other labels than the model."""


class HubError(IsoPruneError, RuntimeError):
    """The Hub refused or could not be reached."""
