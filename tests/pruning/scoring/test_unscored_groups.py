"""Groups that a criterion cannot score: the others get the scores that they get without them, and it is left whole."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from helpers.odd_networks import calibration_batches, open_odd
from torch import nn

from isoprune_hf import PruneRecipe, make_plan, score_groups, trace_groups
from isoprune_hf.errors import RecipeError
from isoprune_hf.pruning.cost.macs import cost_model
from isoprune_hf.pruning.groups import CoupledGroup, Member
from isoprune_hf.pruning.scoring.criteria.registry import CRITERIA
from isoprune_hf.pruning.scoring.scores import ImportanceScores

RECIPE = PruneRecipe(target_macs="60%", round_to=1, criterion="gate_fisher", allocation="class")
BUFFER = Member("other.norm1.running_mean", 0, np.arange(32)[:, None])  # nothing reads it, and it is no parameter
BARE = CoupledGroup("bare", "Buffer", 32, (BUFFER,))


@pytest.mark.parametrize("criterion", sorted(CRITERIA.keys() - {"random"}))
def test_unscored_group_changes_no_other_score(criterion: str) -> None:
    model, batches = open_odd("reused").model, calibration_batches(3)
    for norm in (module for module in model.modules() if isinstance(module, nn.BatchNorm2d)):
        nn.init.uniform_(norm.weight)
    groups = trace_groups(model)
    alone = score_groups(model, groups, criterion=criterion, batches=batches).scores
    found = score_groups(model, (BARE, *groups), criterion=criterion, batches=batches).scores
    assert found.keys() == alone.keys() and alone
    assert all(torch.equal(found[name], alone[name]) for name in alone)


@pytest.mark.parametrize("criterion", sorted(CRITERIA.keys() - {"random"}))
def test_model_without_any_scored_group_is_refused(criterion: str) -> None:
    with pytest.raises(RecipeError, match="bare"):
        score_groups(open_odd("reused").model, (BARE,), criterion=criterion, batches=calibration_batches(3))


@pytest.mark.parametrize("allocation", ["class", "knapsack"])
def test_group_without_scores_is_left_whole_and_noted(allocation: str) -> None:
    model = open_odd("reused").model
    groups = trace_groups(model)
    scores = score_groups(model, groups, criterion="gate_fisher", batches=calibration_batches(3))
    missing = groups[-1].name
    fewer = replace(scores, scores={name: value for name, value in scores.scores.items() if name != missing})
    recipe = replace(RECIPE, allocation=allocation)
    plan = make_plan(groups, fewer, recipe, cost=cost_model(model, groups))
    excluded = make_plan(groups, scores, replace(recipe, exclude=[missing]), cost=cost_model(model, groups))
    assert plan.kept == excluded.kept and plan.kept
    assert plan.notes[0].startswith("left whole: 1 group (") and missing in plan.notes[0]


def test_scores_with_other_groups_are_refused() -> None:
    model = open_odd("reused").model
    groups = trace_groups(model)
    scores = score_groups(model, groups, criterion="l1").scores
    renamed = {name if name != groups[0].name else "another": value for name, value in scores.items()}
    for found in (renamed, {}):
        with pytest.raises(RecipeError, match=groups[0].name):
            make_plan(groups, ImportanceScores(found, "l1", "", {}), replace(RECIPE, criterion="l1"))
