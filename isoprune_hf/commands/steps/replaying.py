"""Replay a plan: `settle_transform` before the base is opened, `replay_on_base` after that.

`base_sizes` looks up the sizes that a plan refers to.
"""

from collections.abc import Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from isoprune_hf.checkpoint.modeling_isoprune import IsoPruneForImageClassification
from isoprune_hf.checkpoint.structure import meta_copy
from isoprune_hf.checkpoint.task_forms import TASK_FORMS
from isoprune_hf.commands.steps.opening import Opened
from isoprune_hf.errors import CheckpointError, IsoPruneError, RecipeError
from isoprune_hf.models import load_base
from isoprune_hf.pruning.cutting.replay import replay_plan
from isoprune_hf.pruning.graph.find_groups import trace_groups
from isoprune_hf.pruning.plan import PruningPlan, record_transform
from isoprune_hf.recipes import DataRecipe, PruneRecipe, recipe_to_dict
from isoprune_hf.recipes.data import TRANSFORM

_OPENING_SETTINGS = frozenset({"model", "pretrained", "model_args", "num_labels", "seed"})


def settle_transform(data: DataRecipe, plan: PruningPlan) -> DataRecipe:
    """Return the data section with the settings of the images that a plan was made on.

    Raises:
        CheckpointError: The plan records something else than such settings.
        RecipeError: The section contradicts one of them.
    """
    recorded = plan.settings.get("transform", {})
    if not isinstance(recorded, Mapping):
        raise CheckpointError(f"pruning plan: settings.transform must map names to settings, got {recorded!r:.99}")
    unknown = [name for name in recorded if name not in TRANSFORM]
    if unknown:
        raise CheckpointError(f"pruning plan: settings.transform: unknown entry {unknown[0]!r:.99}")
    for name, value in recorded.items():
        given = getattr(data, name)
        if given not in (None, value):
            raise RecipeError(
                f"data.{name} {given}: the plan was made on images of {name} {value}; leave the setting out, or prune "
                "again with it"
            )
    try:
        return replace(data, **recorded)
    except RecipeError as error:
        raise CheckpointError(f"pruning plan: settings.transform: {error}") from error


def replay_on_base(
    opened: Opened, plan: PruningPlan, settings: dict[str, Any], *, ignore_fingerprint: bool
) -> tuple[IsoPruneForImageClassification, PruningPlan]:
    """Cut a base by a plan.

    Args:
        opened: The base.
        plan: The plan to replay.
        settings: Values of the section prune; all but those that open the base are replaced by the plan's.
        ignore_fingerprint: Accept other weights than those that the plan was made on.

    Returns:
        The cut model, with the recipe in its config, and the plan as replayed.
    """
    pruned, replayed = replay_plan(opened.base.model, plan, ignore_fingerprint=ignore_fingerprint)
    decided = {field.name for field in fields(PruneRecipe)} - _OPENING_SETTINGS
    settings = settings | {key: value for key, value in plan.settings.items() if key in decided}
    recipe = {**(pruned.config.recipe or {}), "prune": settings}
    if opened.images is not None:
        recipe["data"] = recipe_to_dict(opened.data)
    pruned.config.recipe = recipe
    return pruned, record_transform(replayed, opened.data.transform)


def base_sizes(place: str, plan: PruningPlan) -> dict[str, tuple[int, int]]:
    """Return channels and heads of the base's groups by their names.

    Empty if the plan is not in a model's folder, the model was cut from another base, or cannot be opened.
    """
    if not (Path(place) / "config.json").is_file():
        return {}
    try:
        model = load_base(place, tasks=TASK_FORMS).model
        is_own_base = (model.config.source or {}).get("fingerprint") == plan.fingerprint
        if not is_own_base or model.config.layout == "uniform":
            return {}
        return {group.name: (group.channels, group.num_heads) for group in trace_groups(meta_copy(model, dense=True))}
    except (IsoPruneError, OSError):
        return {}  # the plan can be read without the model
