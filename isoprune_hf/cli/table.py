"""Collect the stages that the modules of `commands/` declare, for parser and help."""

import pkgutil
from collections.abc import Iterable
from importlib import import_module

from isoprune_hf import commands
from isoprune_hf.commands.stage import Heading, Stage, StageGroup
from isoprune_hf.recipes import DataRecipe, FinetuneRecipe, PretrainRecipe, PruneRecipe

Section = type[PruneRecipe] | type[DataRecipe] | type[FinetuneRecipe]

SECTIONS: dict[str, Section] = {
    "prune": PruneRecipe,
    "data": DataRecipe,
    "pretrain": PretrainRecipe,
    "finetune": FinetuneRecipe,
}
SWITCHES = {
    "quiet": "Suppress progress output; print only the result.",
    "json": "Print the result as one JSON document; progress output goes to standard error.",
}
EXIT_CODES = {
    0: "success",
    1: "check failed: doctor found a problem, or plan diff found differences",
    2: "bad input, or a package that is not installed: one line on standard error, nothing is written",
    3: "an unexpected error, which is a bug: one line, and a file with the details to report",
    65: "no training state is intact",
    70: "the training has diverged",
    71: "out of memory, of the device or of the machine",
    73: "the folder is in use, or cannot be written",
    74: "a file could not be read or written (full disk), or a rank or a loader process was lost; rerun the same "
    "command to resume from the last saved state",
    75: "stopped by a signal during training; rerun the same command to resume",
    130: "the same, by Ctrl-C",
}


def _collect() -> list[Stage | StageGroup]:
    """Import every module of `commands/` and return what they declare as `STAGE`, in the order of the help."""
    modules = [import_module(f"{commands.__name__}.{found.name}") for found in pkgutil.iter_modules(commands.__path__)]
    declared = [module.STAGE for module in modules if "STAGE" in vars(module)]
    return sorted(declared, key=lambda found: _stages_of(found)[0].order)


def _stages_of(declared: Stage | StageGroup) -> tuple[Stage, ...]:
    return declared.stages if isinstance(declared, StageGroup) else (declared,)


def _headings(declared: Iterable[Stage | StageGroup]) -> dict[str, tuple[str, ...]]:
    members: dict[str, list[str]] = {heading.value: [] for heading in Heading}
    for found in declared:
        members[_stages_of(found)[0].heading.value].append(found.name)
    return {title: tuple(names) for title, names in members.items()}


_DECLARED = _collect()
# A stage of two words is an action of a group.
STAGES: dict[str, Stage] = {stage.name: stage for declared in _DECLARED for stage in _stages_of(declared)}
GROUPS: dict[str, StageGroup] = {found.name: found for found in _DECLARED if isinstance(found, StageGroup)}
HEADINGS = _headings(_DECLARED)
