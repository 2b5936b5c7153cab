"""Prune in several steps: `recipe_of_step` sets the aim of a step, `lift_scores` maps its scores back to the base."""

from dataclasses import replace

import torch

from isoprune_hf.pruning.cost.latency import LatencyModel
from isoprune_hf.pruning.cost.macs import CostModel
from isoprune_hf.pruning.deciding.budget import budget_limit
from isoprune_hf.pruning.plan import PruningPlan
from isoprune_hf.pruning.scoring.scores import ImportanceScores
from isoprune_hf.recipes import PruneRecipe


def recipe_of_step(
    recipe: PruneRecipe, step: int, cost: CostModel, latency: LatencyModel | None = None
) -> PruneRecipe:
    """Return the recipe of an intermediate step, which covers step / steps of the way to the ratios or the budget.

    Only the last step rounds widths, so that the steps before it remove exactly what was asked for.

    Args:
        recipe: The recipe of the whole pruning.
        step: Number of the step, from 1 to `recipe.steps` - 1.
        cost: Cost of the base.
        latency: Latency of the base; needed for a latency budget.
    """
    share = step / recipe.steps
    remove_blocks = recipe.remove_blocks
    if isinstance(remove_blocks, int):
        remove_blocks = round(remove_blocks * share)
    elif isinstance(remove_blocks, dict):
        remove_blocks = {pattern: round(count * share) for pattern, count in remove_blocks.items()}
    ratios = {pattern: ratio * share for pattern, ratio in recipe.ratios.items()}
    at_step = replace(recipe, round_to=1, ratios=ratios, remove_blocks=remove_blocks)
    if recipe.budget is None:
        head_dim_ratio = None if recipe.head_dim_ratio is None else recipe.head_dim_ratio * share
        return replace(
            at_step, ratio=recipe.ratio * share, head_ratio=recipe.head_ratio * share, head_dim_ratio=head_dim_ratio
        )
    limit = budget_limit(recipe.budget, cost, latency)
    target = limit.base - (limit.base - limit.target) * share
    if recipe.budget.kind == "macs":
        return replace(at_step, target_macs=target)
    if recipe.budget.kind == "params":
        return replace(at_step, target_params=target)
    return replace(at_step, target_latency=target)


def lift_scores(before: ImportanceScores, plan: PruningPlan, fresh: ImportanceScores) -> ImportanceScores:
    """Map the scores of an intermediate model to the channels of the base.

    Args:
        before: Scores of the base before the step.
        plan: The plan of the step, for the base.
        fresh: Scores of the model after the step.

    Returns:
        Scores of the base: fresh ones for the channels that the step kept; removed channels rank below them, the
        earlier removed ones lowest.
    """
    scale = torch.cat(list(before.scores.values())).clamp(min=0).mean()
    scores: dict[str, torch.Tensor] = {}
    for name, old in before.scores.items():
        lifted = _sink(old, scale)
        if name in fresh.scores:
            kept = torch.tensor(plan.kept.get(name, range(len(old))))
            lifted[kept] = fresh.scores[name]
        scores[name] = lifted
    blocks = {
        name: fresh.blocks[name] if name in fresh.blocks else float(_sink(torch.tensor(old), scale))
        for name, old in before.blocks.items()
    }
    return replace(fresh, scores=scores, blocks=blocks, fingerprint=before.fingerprint)


def _sink(scores: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Move scores below 0 in their order: non-negative ones into [-1, 0), negative ones down by 1.

    `scale` is the usual size of the scores: without it small scores would become equal in float32.
    """
    return torch.where(scores >= 0, -scale / (scale + scores.clamp(min=0)), scores - 1)
