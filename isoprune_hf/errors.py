# Copyright 2026 the isoprune_hf authors. Licensed under the Apache License, Version 2.0.
"""Exceptions raised for user mistakes and for failures of the environment.

Each class also derives from a built-in exception. A message states what is wrong, the value that was given, what is
allowed, and what to do about it.
"""

__all__ = [
    "BudgetError",
    "Cancelled",
    "CheckpointError",
    "ConflictError",
    "DamagedStateError",
    "DatasetError",
    "DivergedError",
    "ExportError",
    "HubError",
    "ImageError",
    "Interrupted",
    "IsoPruneError",
    "LoaderError",
    "LostRankError",
    "MemoryFault",
    "MissingExtraError",
    "OccupiedError",
    "RecipeError",
    "TrainingFault",
    "UnsupportedArchitectureError",
    "WriteError",
]


class IsoPruneError(Exception):
    """Base class of all errors that a user of isoprune_hf can correct."""


class CheckpointError(IsoPruneError, ValueError):
    """Raised when a saved folder is damaged, hostile, or newer than this code; the message names the entry."""


class ImageError(IsoPruneError, ValueError):
    """Raised when an image has more pixels than the decoding limit."""


class RecipeError(IsoPruneError, ValueError):
    """Raised when a setting is out of range, names something unknown, or contradicts another setting."""


class BudgetError(IsoPruneError, ValueError):
    """Raised when removing all prunable channels would not reach the budget."""


class UnsupportedArchitectureError(IsoPruneError, ValueError):
    """Raised when a model is of a kind that cannot be pruned, or when a cut would break it."""


class DatasetError(IsoPruneError, ValueError):
    """Raised when a data set is missing or has other columns or labels than the model needs."""


class HubError(IsoPruneError, RuntimeError):
    """Raised when the Hub rejects a request or cannot be reached."""


class ExportError(IsoPruneError, RuntimeError):
    """Raised when a model cannot be exported, or when the exported model computes other outputs."""


class MissingExtraError(IsoPruneError, ModuleNotFoundError):
    """Raised when a package of an optional extra is required but not installed."""


class TrainingFault(IsoPruneError):
    """Base class of errors that stop a training run but keep its saved states.

    The command line exits with the `exit_code` of the class.
    """

    exit_code = 1


class DamagedStateError(TrainingFault, ValueError):
    """Raised when none of the saved training states is intact."""

    exit_code = 65


class DivergedError(TrainingFault, RecipeError):
    """Raised when the loss or a gradient is not finite."""

    exit_code = 70


class MemoryFault(TrainingFault, RuntimeError):
    """Raised when the device or the machine is out of memory."""

    exit_code = 71


class OccupiedError(TrainingFault, RuntimeError):
    """Raised when another process writes to the same place, or when the folder of a run is not writable."""

    exit_code = 73


class WriteError(TrainingFault, CheckpointError):
    """Raised when the results cannot be written at the end of a run."""

    exit_code = 74


class ConflictError(WriteError):
    """Raised when others have changed the output while a command worked; its result is complete in another place."""


class LoaderError(TrainingFault, RuntimeError):
    """Raised when a worker process of the data loader died."""

    exit_code = 74


class LostRankError(TrainingFault, RuntimeError):
    """Raised when another rank died or does not respond."""

    exit_code = 74


class Interrupted(TrainingFault, RuntimeError):
    """Raised when a signal stopped a training run; the same command resumes it."""

    exit_code = 75


class Cancelled(Interrupted):
    """Raised when Ctrl-C stopped a training run; the same command resumes it."""

    exit_code = 130
