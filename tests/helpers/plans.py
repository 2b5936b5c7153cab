"""Coupled groups, costs and plans that can be computed by hand."""

import numpy as np
import torch

from isoprune_hf.pruning.cost.macs import CostModel, ModelCost, Term
from isoprune_hf.pruning.deciding.make_plan import make_plan
from isoprune_hf.pruning.graph.widths import Tie, Width
from isoprune_hf.pruning.groups import CoupledGroup, Member
from isoprune_hf.pruning.scoring.scores import ImportanceScores
from isoprune_hf.recipes import PruneRecipe

BY_CLASS = {"allocation": "class", "normalizer": "none", "max_ratio": 1.0}  # scores as they are


def group(name, signature, channels, num_heads=0, ways=1):
    index = np.arange(channels * ways).reshape(ways, channels).T
    return CoupledGroup(name, signature, channels, (Member(f"{name}.weight", 0, index),), num_heads)


def cost_of(groups, blocks=()):
    """Return a cost of ten MACs and ten parameters for each row of each group's weight."""
    rows = [Width(g.members[0].index.size, (Tie(g.name, g.members[0].index.shape[1], "channel"),)) for g in groups]
    terms = [Term(g.name, (row, Width(10))) for g, row in zip(groups, rows, strict=True)]
    total = 10 * sum(row.size for row in rows)
    counts = {g.name: (g.channels, g.num_heads) for g in groups}
    return CostModel(ModelCost(total, total), terms, terms, counts, [block.name for block in blocks])


def plan_for(scores, groups, blocks=(), block_scores=None, **options):
    recipe = PruneRecipe(**{**BY_CLASS, "round_to": 1, "min_keep": 1, **options})
    values = {name: torch.tensor(value, dtype=torch.float32) for name, value in scores.items()}
    known = ImportanceScores(values, "l1", "print", {}, blocks=block_scores or {})
    return make_plan(groups, known, recipe, cost=cost_of(groups, blocks), blocks=blocks)
