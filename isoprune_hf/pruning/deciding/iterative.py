"""Cutting in several steps: what a step aims at, and how scores of a smaller model become scores of the base."""

from dataclasses import replace

import torch

from isoprune_hf.pruning.cost.latency import LatencyModel
from isoprune_hf.pruning.cost.macs import CostModel
from isoprune_hf.pruning.plan import PruningPlan
from isoprune_hf.pruning.scoring.scores import ImportanceScores
from isoprune_hf.recipes import PruneRecipe


def recipe_of_step(
    recipe: PruneRecipe, step: int, cost: CostModel, latency: LatencyModel | None = None
) -> PruneRecipe:
    """Return the recipe of an intermediate step: that share of the way to the ratios or to the budget.

    Widths are rounded in the last step alone, so that the steps before it remove exactly what was asked.
    """
    share = step / recipe.steps
    changes: dict[str, object] = {"round_to": 1}
    budget = recipe.budget
    if budget is not None:
        if budget.kind == "latency":
            base = latency.predict(cost.layer_macs({}, {}))
        else:
            base = getattr(cost.base, budget.kind)
        changes[budget.setting] = base - (base - budget.resolve(base)) * share
    else:
        changes |= {"ratio": recipe.ratio * share, "head_ratio": recipe.head_ratio * share}
        if recipe.head_dim_ratio is not None:
            changes["head_dim_ratio"] = recipe.head_dim_ratio * share
    changes["ratios"] = {pattern: ratio * share for pattern, ratio in recipe.ratios.items()}
    if isinstance(recipe.remove_blocks, int):
        changes["remove_blocks"] = round(recipe.remove_blocks * share)
    elif isinstance(recipe.remove_blocks, dict):
        changes["remove_blocks"] = {pattern: round(count * share) for pattern, count in recipe.remove_blocks.items()}
    return replace(recipe, **changes)


def lift_scores(before: ImportanceScores, plan: PruningPlan, fresh: ImportanceScores) -> ImportanceScores:
    """Spread the scores of what a step has left over the channels of the base.

    Args:
        before: Scores of the base, as the step had them.
        plan: What the step removed from the base.
        fresh: Scores of the model that the step has left.

    Returns:
        Scores of the base: fresh ones for what is left; what has left ranks below it, in the order in which it left.
    """
    scale = torch.cat(list(before.scores.values())).clamp(min=0).mean()
    scores, blocks = {}, {}
    for name, old in before.scores.items():
        lifted = _sink(old, scale)
        if name in fresh.scores:
            kept = torch.tensor(plan.kept.get(name, range(len(old))))
            lifted[kept] = fresh.scores[name]
        scores[name] = lifted
    for name, old in before.blocks.items():
        blocks[name] = fresh.blocks[name] if name in fresh.blocks else float(_sink(torch.tensor(old), scale))
    return replace(fresh, scores=scores, blocks=blocks, fingerprint=before.fingerprint)


def _sink(scores: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Move scores below 0, in their order: those from 0 up into [-1, 0), those below 0 by 1 down.

    `scale` is their usual size: without it small scores would become equal in float32.
    """
    return torch.where(scores >= 0, -scale / (scale + scores.clamp(min=0)), scores - 1)
