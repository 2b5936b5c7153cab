# Copyright 2026 the isoprune_hf authors. Licensed under the Apache License, Version 2.0.
"""Errors that a user can mend: each says what is wrong, what was given and what is allowed, and is also a built-in."""

__all__ = [
    "BudgetError",
    "Cancelled",
    "CheckpointError",
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
    """Base of every error that the user of isoprune_hf can correct."""


class CheckpointError(IsoPruneError, ValueError):
    """A saved folder is damaged, hostile, or newer than this code; the message names the entry."""


class ImageError(IsoPruneError, ValueError):
    """An image has more pixels than are ever decoded."""


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


class ExportError(IsoPruneError, RuntimeError):
    """A model cannot be exported, or answers otherwise once it is."""


class MissingExtraError(IsoPruneError, ModuleNotFoundError):
    """A package that this work needs comes with an extra that is not installed."""


class TrainingFault(IsoPruneError):
    """What ends a training without loss: its states stay, and the process ends with `exit_code`."""

    exit_code = 1


class DamagedStateError(TrainingFault, ValueError):
    """No training state is intact."""

    exit_code = 65


class DivergedError(TrainingFault, RecipeError):
    """The loss or the gradient is not finite."""

    exit_code = 70


class MemoryFault(TrainingFault, RuntimeError):
    """The memory of the device or of the machine does not suffice."""

    exit_code = 71


class OccupiedError(TrainingFault, RuntimeError):
    """Another run trains in the same folder, or the folder cannot be written."""

    exit_code = 73


class WriteError(TrainingFault, CheckpointError):
    """What must be written at the end of a run cannot be."""

    exit_code = 74


class LoaderError(TrainingFault, RuntimeError):
    """A loader process was lost."""

    exit_code = 74


class LostRankError(TrainingFault, RuntimeError):
    """Another rank was lost, or hangs."""

    exit_code = 74


class Interrupted(TrainingFault, RuntimeError):
    """A signal has ended a training; the same command continues it."""

    exit_code = 75


class Cancelled(Interrupted):
    """The same by Ctrl-C."""

    exit_code = 130
