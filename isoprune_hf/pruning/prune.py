"""The first half of the road in its order: groups, scores, plan, cut."""

import copy
import logging
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from transformers import BaseImageProcessor

from isoprune_hf.checkpoint.folder import save_model_folder
from isoprune_hf.checkpoint.modeling_isoprune import IsoPruneForImageClassification
from isoprune_hf.checkpoint.structure import is_cut
from isoprune_hf.pruning.calibration.calibration import Batches, Calibration
from isoprune_hf.pruning.cost.latency import LatencyModel
from isoprune_hf.pruning.cost.macs import CostModel, ModelCost, cost_model
from isoprune_hf.pruning.cutting.cut import apply_plan
from isoprune_hf.pruning.cutting.uniform import check_family, to_stock
from isoprune_hf.pruning.deciding.budget import check_budget
from isoprune_hf.pruning.deciding.iterative import lift_scores, recipe_of_step
from isoprune_hf.pruning.deciding.make_plan import make_plan, recipe_of_scores
from isoprune_hf.pruning.graph.blocks import find_blocks
from isoprune_hf.pruning.graph.find_groups import trace_groups
from isoprune_hf.pruning.groups import CoupledGroup, ResidualBlock
from isoprune_hf.pruning.latency_budget import fit_base, latency_settings, meet_latency
from isoprune_hf.pruning.plan import PruningPlan
from isoprune_hf.pruning.repairing.attention_scale import keep_scale
from isoprune_hf.pruning.repairing.repair import repair
from isoprune_hf.pruning.score import (
    assign_to_base,
    check_calibration,
    check_scores,
    rotate_base,
    score_with_recipe,
)
from isoprune_hf.pruning.scoring.scores import ImportanceScores, Sample
from isoprune_hf.recipes import PruneRecipe, recipe_to_dict

logger = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class PruneResult:
    """What `prune_model` made.

    Args:
        model: The pruned model.
        plan: The decision.
        scores: What it was decided from.
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

    def save(self, folder: str | Path, processor: BaseImageProcessor) -> None:
        """Write the whole folder, or nothing."""
        save_model_folder(folder, self.model, processor, plan=self.plan.to_json())


@dataclass(frozen=True, eq=False)
class Traced:
    """What is known of a base before anything is scored."""

    groups: tuple[CoupledGroup, ...]
    blocks: tuple[ResidualBlock, ...]
    cost: CostModel
    latency: LatencyModel | None


def prune_model(
    model: IsoPruneForImageClassification,
    recipe: PruneRecipe,
    calibration: Batches | None = None,
    accelerator: Accelerator | None = None,
    *,
    scores: ImportanceScores | None = None,
    sample: Sample | None = None,
) -> PruneResult:
    """Score, decide and cut.

    Args:
        model: The base, of `load_base`; left untouched.
        recipe: What to do. With `steps` above 1 the scoring is repeated on what each step has left.
        calibration: This rank's micro-batches (images (B, C, H, W), labels (B,)); only for data-driven criteria. For
            several steps it must be possible to go through them again.
        accelerator: Ranks that share the scoring. One rank decides, all cut alike.
        scores: Scores of an earlier run instead of a new scoring.
        sample: Record of the calibration sample for the plan.

    Raises:
        RecipeError, BudgetError, UnsupportedArchitectureError: See `score_groups`, `make_plan`, `trace_groups`,
            `rotate_heads` and `repair`.
    """
    seconds = dict.fromkeys(("trace", "rotate", "score", "solve", "cut", "repair"), 0.0)
    traced = _timed(seconds, "trace", lambda: _trace(model, recipe, accelerator))
    if scores is not None:
        recipe = recipe_of_scores(recipe, scores)
    check_calibration(recipe, calibration, scores)
    if scores is not None:
        check_scores(model, recipe, scores)
    images = None if calibration is None else Calibration(calibration, accelerator)
    rotated = _timed(seconds, "rotate", lambda: rotate_base(model, recipe, traced.groups, images))

    def score(
        scored: IsoPruneForImageClassification, groups: tuple[CoupledGroup, ...], blocks: tuple[ResidualBlock, ...]
    ) -> ImportanceScores:
        return score_with_recipe(scored, recipe, groups, images, blocks=blocks, sample=sample)

    def decide(decided: PruneRecipe) -> PruningPlan:
        plan = make_plan(
            traced.groups, scores, decided, cost=traced.cost, latency=traced.latency, blocks=traced.blocks
        )
        return _from_main(plan, accelerator)

    def cut(plan: PruningPlan) -> IsoPruneForImageClassification:
        return apply_plan(rotated.model, plan, traced.groups, base_cost=traced.cost.base)

    if scores is None:
        first = _timed(seconds, "score", lambda: score(rotated.model, traced.groups, traced.blocks))
        scores = assign_to_base(first, model, recipe)
        for step in range(1, recipe.steps):
            intermediate = recipe_of_step(recipe, step, traced.cost, traced.latency)
            plan = _timed(seconds, "solve", lambda now=intermediate: decide(now))
            smaller = _timed(seconds, "cut", lambda now=plan: cut(now))
            keep_scale(rotated, smaller, plan, traced.groups)
            groups, blocks = _find(smaller, recipe)
            fresh = _timed(seconds, "score", lambda now=(smaller, groups, blocks): score(*now))
            scores = lift_scores(scores, plan, fresh)
            logger.info(f"step {step} of {recipe.steps}: {plan.achieved['pruned']['macs'] / 1e9:.4g} GMACs")
    recipe = replace(
        recipe,
        criterion=scores.criterion,
        reduction=scores.reduction,
        score_batchnorm=scores.score_batchnorm,
        scoring_precision=scores.precision,
    )
    if recipe.target_latency is None:
        plan = _timed(seconds, "solve", lambda: decide(recipe))
        pruned = _timed(seconds, "cut", lambda: cut(plan))
    else:
        plan, pruned = _timed(
            seconds,
            "solve",
            lambda: meet_latency(
                model,
                recipe,
                traced.cost,
                traced.latency,
                decide=decide,
                cut=cut,
                agree=lambda value: _from_main(value, accelerator),
            ),
        )
    notes = _timed(
        seconds,
        "repair",
        lambda: repair(rotated, pruned, plan, traced.groups, recipe.reconstruct or "none", images),
    )
    plan = replace(plan, notes=(*plan.notes, *rotated.notes, *notes))
    if recipe.layout == "uniform":
        pruned = to_stock(pruned, _first_images(calibration))
    pruned.config.recipe = {**copy.deepcopy(pruned.config.recipe or {}), "prune": recipe_to_dict(recipe)}
    if not is_cut(model.config):  # else the source names a base before this one
        pruned.config.source = {**(pruned.config.source or {}), "fingerprint": scores.fingerprint}
    pruned_cost = ModelCost(**pruned.config.cost["pruned"])
    _report(model, plan, traced.cost.base, pruned_cost, seconds)
    return PruneResult(pruned, plan, scores, traced.groups, traced.cost.base, pruned_cost, seconds)


def _trace(model: IsoPruneForImageClassification, recipe: PruneRecipe, accelerator: Accelerator | None) -> Traced:
    if recipe.layout == "uniform":
        check_family(model)
    groups, blocks = _find(model, recipe)
    cost = cost_model(model, groups, blocks)
    latency = None
    if recipe.target_latency is not None:
        latency = _from_main(
            fit_base(model, groups, cost, latency_settings(recipe), round_to=recipe.round_to), accelerator
        )
    check_budget(groups, recipe, cost, latency, blocks)
    return Traced(groups, blocks, cost, latency)


def _find(
    model: IsoPruneForImageClassification, recipe: PruneRecipe
) -> tuple[tuple[CoupledGroup, ...], tuple[ResidualBlock, ...]]:
    return trace_groups(model, recipe.signature, recipe.engine), () if recipe.remove_blocks is None else find_blocks(
        model
    )


def _first_images(calibration: Batches | None) -> torch.Tensor | None:
    """Real images where some can be had again: an iterator has given its own away."""
    if calibration is None or isinstance(calibration, Iterator):
        return None
    return next((images for images, _ in calibration), None)


def _from_main(value: Any, accelerator: Accelerator | None) -> Any:
    """What the main process has, on every rank."""
    if accelerator is None or accelerator.num_processes == 1:
        return value
    return broadcast_object_list([value])[0]


def _report(
    model: IsoPruneForImageClassification,
    plan: PruningPlan,
    base: ModelCost,
    pruned: ModelCost,
    seconds: dict[str, float],
) -> None:
    times = ", ".join(f"{stage} {duration:.1f} s" for stage, duration in seconds.items() if duration)
    logger.info(
        f"pruned {type(model.model).__name__}: {base.macs / 1e9:.4g} -> {pruned.macs / 1e9:.4g} GMACs, "
        f"{base.params / 1e6:.4g} -> {pruned.params / 1e6:.4g} M params ({times})"
    )
    for note in plan.notes:
        logger.info(note)


def _timed(seconds: dict[str, float], stage: str, work: Callable[[], Any]) -> Any:
    start = time.perf_counter()
    result = work()
    seconds[stage] += time.perf_counter() - start
    return result
