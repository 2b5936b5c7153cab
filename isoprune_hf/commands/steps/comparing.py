"""Inspect a model: list its classes (`list_classes`), or compare the plans of all alternatives (`compare_plans`)."""

from dataclasses import replace
from pathlib import Path

from accelerate import Accelerator

from isoprune_hf.checkpoint.fingerprint import fingerprint
from isoprune_hf.checkpoint.structure import meta_copy
from isoprune_hf.checkpoint.task_forms import TASK_FORMS
from isoprune_hf.commands.steps.holding_out import settle_holdout
from isoprune_hf.commands.steps.opening import open_data, open_inputs
from isoprune_hf.commands.steps.settling import settle
from isoprune_hf.errors import CheckpointError, RecipeError
from isoprune_hf.models import load_base
from isoprune_hf.pruning.cost.macs import cost_model
from isoprune_hf.pruning.deciding.alternatives import DEFAULT_BUDGET, make_alternatives, recipe_of_budget
from isoprune_hf.pruning.deciding.budget import check_budget
from isoprune_hf.pruning.graph.blocks import find_blocks
from isoprune_hf.pruning.graph.find_groups import trace_groups
from isoprune_hf.pruning.plan import PLAN_FILE, PruningPlan
from isoprune_hf.pruning.score import score_model
from isoprune_hf.recipes import Budget, DataRecipe, PruneRecipe
from isoprune_hf.reporting.inspection_page import Inspected

OWN_PLAN = "plan"  # name of the folder's own plan among the alternatives


def list_classes(name: str, prune: PruneRecipe) -> Inspected:
    """Trace a model without scoring it.

    Args:
        name: Folder or name of the model; a name that is not a folder is opened without trained weights.
        prune: Recipe whose tracing settings are used.
    """
    opened = load_base(name, Path(name).is_dir(), model_args=prune.model_args, tasks=TASK_FORMS).model
    plan = _load_plan(name)
    # The groups of a plan are those of the dense base.
    traced = opened if plan is None else meta_copy(opened, dense=True)
    plans = {} if plan is None else {OWN_PLAN: plan}
    return Inspected(name, trace_groups(traced, prune.signature, prune.engine), plans)


def compare_plans(
    name: str, prune: PruneRecipe, data: DataRecipe, scores_file: str | None, accelerator: Accelerator
) -> Inspected:
    """Trace and score a base once, and decide by every alternative at the same MACs.

    Args:
        name: Folder or name of the model. For a pruned folder, its own plan is compared as well, at its MACs.
        prune: How to open, trace and score the base.
        data: Images to score on.
        scores_file: Scores to use instead.
        accelerator: The ranks.

    Raises:
        CheckpointError: The plan in the folder was made on other weights than those of its base.
        RecipeError: The scores were, or the folder names no base.
    """
    data = settle_holdout(data, name)
    images = open_data(data, accelerator) if data.dataset else None
    prune, scores, reader = settle(prune, images, scores_file, only_decides=True)
    plan = _load_plan(name)
    source = prune if plan is None else _source_recipe(name, prune)
    opened = open_inputs(source, data, images, accelerator, reader=reader, scores=scores)
    model = opened.base.model
    weights = fingerprint(model.model)
    if plan is not None and plan.fingerprint != weights:
        raise CheckpointError(f"the plan in {name} was made on other weights than those of {source.model}")
    groups = trace_groups(model, prune.signature, prune.engine)
    blocks = find_blocks(model) if prune.remove_blocks is not None else ()
    cost = cost_model(model, groups, blocks)
    own_macs = None if plan is None else plan.achieved.get("pruned", {}).get("macs")
    recipe = recipe_of_budget(prune, prune.target_macs or own_macs or DEFAULT_BUDGET)
    check_budget(groups, recipe, cost, None, blocks)
    if scores is None:
        calibration = replace(opened, prune=prune).open_calibration()  # its seed is not that of the folder's base
        scores = score_model(model, prune, calibration.batches, accelerator, sample=calibration.sample)
    elif scores.fingerprint != weights:
        raise RecipeError(f"the scores in {scores_file} were made from other weights than those of {source.model}")
    plans = {} if plan is None else {OWN_PLAN: plan}
    plans |= make_alternatives(groups, scores, recipe, cost=cost, blocks=blocks)
    target = (recipe.budget or Budget.parse(DEFAULT_BUDGET, "macs")).resolve(cost.base.macs)
    budget = f"At {target / 1e9:.4g} GMACs, {target / cost.base.macs:.1%} of the base"
    return Inspected(name, groups, plans, scores, cost.base, budget)


def _load_plan(name: str) -> PruningPlan | None:
    """Load the plan of a folder; None for a uniform one, whose stock config does not lead back to the groups."""
    if not (Path(name) / PLAN_FILE).is_file() or load_base(name, tasks=TASK_FORMS).model.config.layout == "uniform":
        return None
    return PruningPlan.load(name)


def _source_recipe(name: str, prune: PruneRecipe) -> PruneRecipe:
    """Return a recipe that opens the dense base that a folder was cut from, instead of the folder."""
    source = load_base(name, tasks=TASK_FORMS).model.config.source or {}
    if not source.get("name"):
        raise RecipeError(f"{name} has a plan but does not name the base that it was cut from: nothing can be scored")
    settings = ("pretrained", "seed", "model_args", "num_labels", "weights")
    return replace(prune, model=source["name"], **{key: source[key] for key in settings if key in source})
