"""The compared plans: every alternative equals the plan of its settings."""

from dataclasses import replace
from pathlib import Path

import pytest
from helpers.tiny_models import make_base

from isoprune_hf.errors import RecipeError
from isoprune_hf.pruning.cost.macs import cost_model, count_cost
from isoprune_hf.pruning.cutting.cut import apply_plan
from isoprune_hf.pruning.deciding.alternatives import (
    ALTERNATIVES,
    check_comparable,
    make_alternatives,
    recipe_of_budget,
)
from isoprune_hf.pruning.deciding.make_plan import make_plan
from isoprune_hf.pruning.graph.find_groups import trace_groups
from isoprune_hf.pruning.scoring.score_groups import score_groups
from isoprune_hf.recipes import PruneRecipe


@pytest.mark.parametrize("family", ["vit", "resnet"])
def test_each_alternative_plan_has_equal_macs(family: str, tmp_path: Path) -> None:
    model = make_base(family, tmp_path)
    groups = trace_groups(model)
    scores, cost = score_groups(model, groups, criterion="l1"), cost_model(model, groups)
    recipe = PruneRecipe(criterion="l1", target_macs="60%", round_to=1)
    plans = make_alternatives(groups, scores, recipe, cost=cost)
    assert list(plans) == ["local", "global", "isomorphic"]  # the weights' norms are no losses
    losses = replace(scores, criterion="gate_fisher")
    every = make_alternatives(groups, losses, recipe, cost=cost)
    assert list(every) == list(ALTERNATIVES)
    chosen = PruneRecipe(criterion="gate_fisher", allocation="knapsack", target_macs="60%", round_to=1)
    assert every["knapsack"].kept == make_plan(groups, losses, chosen, cost=cost).kept != every["isomorphic"].kept
    for scope in ("local", "global", "isomorphic"):
        alone = PruneRecipe(criterion="l1", target_macs="60%", round_to=1, scope=scope)
        assert plans[scope] == make_plan(groups, scores, alone, cost=cost)
        assert 0.97 <= count_cost(apply_plan(model, plans[scope])).macs / (0.6 * cost.base.macs) <= 1
    assert plans["local"].kept != plans["global"].kept != plans["isomorphic"].kept


def test_new_budget_keeps_settings_filled_by_preset() -> None:
    assert recipe_of_budget(PruneRecipe(criterion="taylor", target_params="3M"), "50%") == PruneRecipe(
        criterion="taylor", target_macs="50%"
    )
    made = recipe_of_budget(PruneRecipe(preset="reference"), "50%", scope="local")
    assert (made.target_macs, made.scope, made.engine, made.selection) == (
        "50%",
        "local",
        "torch-pruning",
        "threshold",
    )


@pytest.mark.parametrize("setting", ["target_params", "target_latency"])
def test_another_budget_than_macs_is_refused(setting: str) -> None:
    with pytest.raises(RecipeError, match=rf"set prune.target_macs, not prune.{setting}"):
        check_comparable(PruneRecipe(**{setting: "50%"}))
    check_comparable(PruneRecipe(criterion="taylor", target_macs="50%"))
