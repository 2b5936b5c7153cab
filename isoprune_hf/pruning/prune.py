"""The first half of the road in its order: groups, scores, plan, cut."""

import copy
import logging
import time
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from transformers import BaseImageProcessor

from isoprune_hf.checkpoint.folder import save_model_folder
from isoprune_hf.checkpoint.modeling_isoprune import IsoPruneForImageClassification
from isoprune_hf.errors import RecipeError
from isoprune_hf.pruning.cost import ModelCost, cost_model
from isoprune_hf.pruning.graph import trace_groups
from isoprune_hf.pruning.groups import CoupledGroup
from isoprune_hf.pruning.importance import ImportanceScores, fingerprint, score_groups, scoring_options
from isoprune_hf.pruning.planning import PruningPlan, make_plan
from isoprune_hf.pruning.surgery import apply_plan
from isoprune_hf.recipes import PruneRecipe, recipe_to_dict

logger = logging.getLogger(__name__)

Batches = Iterable[tuple[torch.Tensor, torch.Tensor]]


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
        seconds: Wall seconds of trace, score, solve and cut.
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


def prune_model(
    model: IsoPruneForImageClassification,
    recipe: PruneRecipe,
    calibration: Batches | None = None,
    accelerator: Accelerator | None = None,
    *,
    scores: ImportanceScores | None = None,
    sample: dict[str, str | int] | None = None,
) -> PruneResult:
    """Score, decide and cut.

    Args:
        model: The base, of `load_base`; left untouched.
        recipe: What to do.
        calibration: This rank's micro-batches (images (B, C, H, W), labels (B,)); only for data-driven criteria.
        accelerator: Ranks that share the scoring. One rank decides, all cut alike.
        scores: Scores of an earlier run instead of a new scoring.
        sample: Record of the calibration sample for the plan.

    Raises:
        RecipeError, BudgetError, UnsupportedArchitectureError: See `score_groups`, `make_plan` and `trace_groups`.
    """
    seconds: dict[str, float] = {}
    groups, costs = _timed(seconds, "trace", lambda: _trace(model))
    if scores is None:
        scores = _timed(
            seconds,
            "score",
            lambda: score_groups(
                model,
                groups,
                batches=calibration,
                accelerator=accelerator,
                sample=sample,
                **scoring_options(recipe),
            ),
        )
    elif scores.fingerprint != fingerprint(model.model):
        raise RecipeError(
            "the scores were made from other weights than this base's; run `isoprune score` on this base"
        )
    recipe = replace(recipe, criterion=scores.criterion)
    plan = _timed(seconds, "solve", lambda: make_plan(groups, scores, recipe, cost=costs))
    if accelerator is not None and accelerator.num_processes > 1:
        plan = broadcast_object_list([plan])[0]
    pruned = _timed(seconds, "cut", lambda: apply_plan(model, plan, groups))
    pruned.config.recipe = {**copy.deepcopy(pruned.config.recipe or {}), "prune": recipe_to_dict(recipe)}
    if not any((model.config.structure or {}).values()):  # else the source names a base before this one
        pruned.config.source = {**(pruned.config.source or {}), "fingerprint": scores.fingerprint}
    pruned_cost = ModelCost(**pruned.config.cost["pruned"])
    logger.info(
        "pruned %s: %.4g -> %.4g GMACs, %.4g -> %.4g M params (%s)",
        type(model.model).__name__,
        costs.base.macs / 1e9,
        pruned_cost.macs / 1e9,
        costs.base.params / 1e6,
        pruned_cost.params / 1e6,
        ", ".join(f"{stage} {duration:.1f} s" for stage, duration in seconds.items()),
    )
    return PruneResult(pruned, plan, scores, groups, costs.base, pruned_cost, seconds)


def _trace(model: IsoPruneForImageClassification):
    groups = trace_groups(model)
    return groups, cost_model(model, groups)


def _timed(seconds: dict[str, float], stage: str, work):
    start = time.perf_counter()
    result = work()
    seconds[stage] = time.perf_counter() - start
    return result
