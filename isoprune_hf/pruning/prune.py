"""Prune a model in the order of the pipeline: trace, rotate, score, decide, cut, repair. Call `prune_model`."""

import copy
import logging
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import nn
from transformers import BaseImageProcessor

from isoprune_hf.checkpoint.folder import save_model_folder
from isoprune_hf.checkpoint.modeling_isoprune import IsoPruneForImageClassification
from isoprune_hf.checkpoint.structure import is_cut
from isoprune_hf.errors import CheckpointError
from isoprune_hf.pruning.calibration.calibration import Batches, Calibration
from isoprune_hf.pruning.cost.macs import ModelCost, cost_model
from isoprune_hf.pruning.cutting.replay import record_base
from isoprune_hf.pruning.cutting.uniform import check_family, to_stock
from isoprune_hf.pruning.deciding.budget import check_budget
from isoprune_hf.pruning.deciding.iterative import lift_scores, recipe_of_step
from isoprune_hf.pruning.deciding.make_plan import recipe_of_scores
from isoprune_hf.pruning.finite import check_inputs, in_usable_types
from isoprune_hf.pruning.graph.blocks import find_blocks
from isoprune_hf.pruning.graph.find_groups import graph_of, trace_groups
from isoprune_hf.pruning.groups import CoupledGroup, ResidualBlock
from isoprune_hf.pruning.latency_budget import fit_base, latency_settings
from isoprune_hf.pruning.pipeline import Cut, PruningRun, StageClock, Traced, broadcast
from isoprune_hf.pruning.plan import PruningPlan, note_left
from isoprune_hf.pruning.score import (
    assign_to_base,
    check_calibration,
    check_scores,
    rotate_base,
)
from isoprune_hf.pruning.scoring.scores import ImportanceScores, Sample
from isoprune_hf.recipes import PruneRecipe, recipe_to_dict

logger = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class PruneResult:
    """The result of `prune_model`.

    Args:
        model: The pruned model.
        plan: The plan that it was cut to.
        scores: The scores that the plan was made from.
        groups: The coupled groups of the base.
        base_cost: Cost of the base.
        pruned_cost: Cost of `model`.
        seconds: Wall seconds of trace, rotate, score, solve, cut and repair.
    """

    model: IsoPruneForImageClassification
    plan: PruningPlan
    scores: ImportanceScores
    groups: tuple[CoupledGroup, ...]
    base_cost: ModelCost
    pruned_cost: ModelCost
    seconds: dict[str, float]

    def __repr__(self) -> str:
        """Return the cost before and after the cut, and the notes of the plan, one on each line."""
        return "\n".join([_compare(self.base_cost, self.pruned_cost), *self.plan.notes])

    def save(self, folder: str | Path, processor: BaseImageProcessor) -> None:
        """Write the folder of the pruned model, completely or not at all."""
        save_model_folder(folder, self.model, processor, plan=self.plan.to_json())


def prune_model(
    model: IsoPruneForImageClassification,
    recipe: PruneRecipe,
    calibration: Batches | None = None,
    accelerator: Accelerator | None = None,
    *,
    scores: ImportanceScores | None = None,
    sample: Sample | None = None,
) -> PruneResult:
    """Score a base, decide what to remove, cut it and repair it.

    Args:
        model: The base, from `load_base`; left untouched.
        recipe: How to prune. With `steps` above 1 the model is repaired and scored again after each
            intermediate cut.
        calibration: This rank's micro-batches (images (B, C, H, W), labels (B,)). Several steps, a rotation or a
            repair iterate over them several times. Without them nothing is rotated or repaired by default.
        accelerator: Ranks that share the images. The main process decides, and all ranks make the same cut.
        scores: Scores of an earlier run; the base is not scored again.
        sample: Description of the calibration sample, recorded in scores and plan.

    Raises:
        RecipeError, BudgetError, UnsupportedArchitectureError: See `score_groups`, `make_plan`, `trace_groups`,
            `rotate_heads` and `repair`.
    """
    check_inputs(model, calibration)
    recipe = recipe if scores is None else recipe_of_scores(recipe, scores)
    recipe = recipe.settled(has_images=calibration is not None)
    clock = StageClock()
    with clock.stage("trace"):
        traced = _trace(model, recipe, accelerator)
    check_calibration(recipe, calibration, scores)
    if scores is not None:
        check_scores(model, recipe, scores)
    images = None if calibration is None else Calibration(calibration, accelerator)
    with clock.stage("rotate"):
        rotated = rotate_base(model, recipe, traced.groups, images)
    run = PruningRun(model, traced, rotated, images, accelerator, sample, clock)
    if scores is None:
        scores = run.score(recipe, rotated.model, traced.groups, traced.blocks)
        scores = assign_to_base(scores, rotated.model, model, recipe)
    recipe = _with_scoring_of(recipe, scores)
    scores, earlier = _cut_in_steps(run, recipe, scores)
    plan, pruned = run.cut_to_budget(recipe, scores)
    notes = run.repair(pruned, plan, recipe, earlier).notes
    pruned, wide = in_usable_types(pruned, model, images)
    trace = graph_of(model, traced.groups).trace
    parts = (*_note_unread(model.model, trace.tensors), *_note_neighbours(plan, traced.groups))
    plan = replace(plan, notes=(*plan.notes, *trace.notes, *parts, *rotated.notes, *notes, *wide))
    if recipe.layout == "uniform":
        pruned = to_stock(pruned, _first_images(calibration))
    _record_origin(pruned, model, recipe, scores)
    pruned_cost = _recorded_cost(pruned)
    _log_result(model, traced.cost.base, pruned_cost, clock.seconds)
    return PruneResult(pruned, plan, scores, traced.groups, traced.cost.base, pruned_cost, clock.seconds)


def _note_unread(network: nn.Module, read: Collection[str]) -> tuple[str, ...]:
    """Return the note on the parts of a network that a pass reads no parameter of, such as a tower of texts."""
    sizes = {
        part: sum(value.numel() for value in module.parameters())
        for part, module in network.named_children()
        if not any(name.startswith(f"{part}.") for name in read)
    }
    names = [part for part, size in sizes.items() if size]
    total = sum(value.numel() for value in network.parameters())
    reason = f"{sum(sizes.values()):,} of {total:,} parameters, which images do not reach"
    return note_left("left whole", "part", {reason: names} if names else {})


def _note_neighbours(plan: PruningPlan, groups: Iterable[CoupledGroup]) -> tuple[str, ...]:
    """Return the note on the pruned groups along whose channels a convolution runs."""
    names = [group.name for group in groups if group.sliding and group.name in plan.kept]
    reason = "a convolution runs along the channels and sees other neighbours after the cut"
    return note_left("approximate", "group", {reason: names} if names else {})


def _trace(model: IsoPruneForImageClassification, recipe: PruneRecipe, accelerator: Accelerator | None) -> Traced:
    if recipe.layout == "uniform":
        check_family(model)
    groups, blocks = _find_units(model, recipe)
    cost = cost_model(model, groups, blocks)
    latency = None
    if recipe.target_latency is not None:
        fitted = fit_base(model, groups, cost, latency_settings(recipe), round_to=recipe.round_to)
        latency = broadcast(fitted, accelerator)
    check_budget(groups, recipe, cost, latency, blocks)
    return Traced(groups, blocks, cost, latency)


def _find_units(
    model: IsoPruneForImageClassification, recipe: PruneRecipe
) -> tuple[tuple[CoupledGroup, ...], tuple[ResidualBlock, ...]]:
    """Find the groups of a model, and its blocks if the recipe removes some."""
    groups = trace_groups(model, recipe.signature, recipe.engine)
    return groups, () if recipe.remove_blocks is None else find_blocks(model)


def _cut_in_steps(
    run: PruningRun, recipe: PruneRecipe, scores: ImportanceScores
) -> tuple[ImportanceScores, Cut | None]:
    """Cut and repair intermediate models, each with the weights of the one before it, and score them.

    Returns:
        Scores of the base, and the last intermediate model; None if there is only one step.
    """
    traced, earlier = run.traced, None
    for step in range(1, recipe.steps):
        with run.clock.stage("solve"):
            plan = run.decide(recipe_of_step(recipe, step, traced.cost, traced.latency), scores)
        with run.clock.stage("cut"):
            smaller = run.cut(plan)
        earlier = run.repair(smaller, plan, recipe, earlier)
        groups, blocks = _find_units(smaller, recipe)
        scores = lift_scores(scores, plan, run.score(recipe, smaller, groups, blocks))
        logger.info(f"step {step} of {recipe.steps}: {plan.achieved['pruned']['macs'] / 1e9:.4g} GMACs")
    return scores, earlier


def _with_scoring_of(recipe: PruneRecipe, scores: ImportanceScores) -> PruneRecipe:
    """Return the recipe with the scoring settings that the scores were made with."""
    return replace(
        recipe,
        criterion=scores.criterion,
        reduction=scores.reduction,
        score_batchnorm=scores.score_batchnorm,
        scoring_precision=scores.precision,
    )


def _record_origin(
    pruned: IsoPruneForImageClassification,
    base: IsoPruneForImageClassification,
    recipe: PruneRecipe,
    scores: ImportanceScores,
) -> None:
    """Record the recipe and the fingerprint of the base in the config of a pruned model, in place."""
    pruned.config.recipe = {**copy.deepcopy(pruned.config.recipe or {}), "prune": recipe_to_dict(recipe)}
    if not is_cut(base.config):  # the source of a cut base names the base before it
        record_base(pruned.config, scores.fingerprint)


def _recorded_cost(pruned: IsoPruneForImageClassification) -> ModelCost:
    """Return the cost that the cut recorded in the config."""
    if pruned.config.cost is None:
        raise CheckpointError("config.cost: missing after a cut")
    return ModelCost(**pruned.config.cost["pruned"])


def _first_images(calibration: Batches | None) -> torch.Tensor | None:
    """Return the first calibration images, or None if the batches are an iterator that was already consumed."""
    if calibration is None or isinstance(calibration, Iterator):
        return None
    return next((images for images, _ in calibration), None)


def _compare(base: ModelCost, pruned: ModelCost) -> str:
    return (
        f"{base.macs / 1e9:.4g} -> {pruned.macs / 1e9:.4g} GMACs, {base.params / 1e6:.4g} -> "
        f"{pruned.params / 1e6:.4g} M params"
    )


def _log_result(
    model: IsoPruneForImageClassification,
    base: ModelCost,
    pruned: ModelCost,
    seconds: dict[str, float],
) -> None:
    times = ", ".join(f"{stage} {duration:.1f} s" for stage, duration in seconds.items() if duration)
    logger.info(f"pruned {type(model.model).__name__}: {_compare(base, pruned)} ({times})")
