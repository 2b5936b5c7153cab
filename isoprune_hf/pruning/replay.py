"""A plan from a file, whoever wrote it, and its replay on a base."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from isoprune_hf.checkpoint.modeling_isoprune import IsoPruneForImageClassification
from isoprune_hf.errors import CheckpointError, RecipeError
from isoprune_hf.pruning.graph import trace_groups
from isoprune_hf.pruning.importance import fingerprint
from isoprune_hf.pruning.planning import PruningPlan
from isoprune_hf.pruning.surgery import apply_plan

PLAN_FILE = "pruning_plan.json"


def read_plan(place: str | Path) -> PruningPlan:
    """Read a plan that may have been edited by hand.

    Args:
        place: The file, or the folder of a pruned model.

    Raises:
        RecipeError: There is no such file.
        CheckpointError: It is no plan, one of another version, or an entry is not what it should be.
    """
    path = Path(place)
    if path.is_dir():
        path = path / PLAN_FILE
        if not path.is_file():
            raise RecipeError(f"plan: {place} holds no {PLAN_FILE}; give a plan, or the folder of a pruned model")
    try:
        plan = PruningPlan.from_json(path.read_text())
        _check_entries(plan)
    except OSError as error:
        raise RecipeError(f"plan: {path} cannot be read ({error.strerror})") from error
    except (ValueError, RecursionError) as error:  # CheckpointError among them
        reason = str(error).removeprefix("pruning plan: ")
        raise CheckpointError(f"pruning plan {path}: {reason}") from error
    return plan


def replay_plan(
    model: IsoPruneForImageClassification, plan: PruningPlan, *, ignore_fingerprint: bool = False
) -> tuple[IsoPruneForImageClassification, PruningPlan]:
    """Cut a copy of a base to a plan that was made before.

    Args:
        model: The base; left untouched.
        plan: Of `read_plan`.
        ignore_fingerprint: Cut other weights than those the plan was made on, too.

    Returns:
        The pruned model, and the plan with the costs and the fingerprint of this base. On the base it was made on,
        a plan that nobody edited comes back as it is, and the tensors are the same bit for bit.

    Raises:
        CheckpointError: The plan is of other weights, or does not fit the model.
    """
    found = fingerprint(model.model)
    if plan.fingerprint != found and not ignore_fingerprint:
        raise CheckpointError(
            f"pruning plan: it was made on other weights (fingerprint {_short(plan.fingerprint)}) than those of this "
            f"base ({_short(found)}); open the base that it was made on, or go on with --ignore_fingerprint true"
        )
    groups = trace_groups(model)
    attention = {group.name for group in groups if group.num_heads}
    for name in plan.heads:
        if name not in attention:
            raise CheckpointError(f"pruning plan: heads names {name!r}, and the model has no such attention")
    pruned = apply_plan(model, plan, groups)
    if not any((model.config.structure or {}).values()):  # else the source names a base before this one
        pruned.config.source = {**(pruned.config.source or {}), "fingerprint": found}
    cost = pruned.config.cost
    known = {name: {key: plan.achieved.get(name, {}).get(key) for key in figures} for name, figures in cost.items()}
    return pruned, replace(plan, fingerprint=found, achieved=plan.achieved if known == cost else cost)


def _short(digest: str) -> str:
    return digest[:12] or "none"


def _check_entries(plan: PruningPlan) -> None:
    """Check what can be checked without the model."""
    for key in ("kept", "heads"):
        for name, numbers in getattr(plan, key).items():
            if not numbers or any(type(number) is not int or number < 0 for number in numbers):
                raise CheckpointError(f"{key} of {name} must be a list of numbers from 0 on, at least one")
            if list(numbers) != sorted(set(numbers)):
                raise CheckpointError(f"{key} of {name} must be ascending, each number once")
    for name in plan.heads:
        if name not in plan.kept:
            raise CheckpointError(f"heads names {name!r}, and kept does not")
    for key in ("removed_blocks", "notes"):
        if not all(isinstance(value, str) for value in getattr(plan, key)):
            raise CheckpointError(f"{key} must be a list of texts")
    for key in ("achieved", "margins"):
        values = getattr(plan, key)
        if not isinstance(values, Mapping) or not all(isinstance(entry, Mapping) for entry in values.values()):
            raise CheckpointError(f"{key} must map names to figures")
    for name in ("base", "pruned"):
        for key, figure in plan.achieved.get(name, {}).items():
            _check_number(f"achieved.{name}.{key}", figure)
    for name, margin in plan.margins.items():
        for key, figure in margin.items():
            _check_number(f"margins of {name}: {key}", figure)
    if not isinstance(plan.settings, Mapping) or not isinstance(plan.fingerprint, str):
        raise CheckpointError("settings must be a mapping and fingerprint a text")


def _check_number(where: str, value: Any) -> None:
    if value is not None and type(value) not in (int, float):
        raise CheckpointError(f"{where} must be a number, got {value!r}")
