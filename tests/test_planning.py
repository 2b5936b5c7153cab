import json

import numpy as np
import pytest
import torch
from tiny_models import make_base

from isoprune_hf.errors import BudgetError, RecipeError
from isoprune_hf.pruning.cost import CostModel, ModelCost, cost_model
from isoprune_hf.pruning.graph import trace_groups
from isoprune_hf.pruning.groups import CoupledGroup, Member
from isoprune_hf.pruning.importance import ImportanceScores, score_groups
from isoprune_hf.pruning.planning import PruningPlan, make_plan
from isoprune_hf.pruning.ranking import keep_counts, round_counts
from isoprune_hf.recipes import PruneRecipe


def group(name, signature, channels, num_heads=0, ways=1):
    index = np.arange(channels * ways).reshape(ways, channels).T
    return CoupledGroup(name, signature, channels, (Member(f"{name}.weight", 0, index),), num_heads)


def plan_for(scores, groups, **options):
    recipe = PruneRecipe(**{"round_to": 1, "min_keep": 1, **options})
    values = {name: torch.tensor(value, dtype=torch.float32) for name, value in scores.items()}
    shapes = {f"{g.name}.weight": (g.members[0].index.size, 10) for g in groups}
    ties = {f"{g.name}.weight": ((0, g.name, g.members[0].index.shape[1], False),) for g in groups}
    positions = dict.fromkeys(shapes, 1)
    total = sum(rows * columns for rows, columns in shapes.values())
    cost = CostModel(ModelCost(total, total), 0, positions, {}, shapes, ties)
    return make_plan(groups, ImportanceScores(values, "l1", "print", {}), recipe, cost=cost)


A, B, C = group("a", "mlp", 4), group("b", "mlp", 4), group("c", "stream", 4)
SCORES = {"a": [1, 2, 3, 4], "b": [5, 6, 7, 8], "c": [0.1, 0.2, 0.3, 0.4]}


def test_isomorphic_scope_ranks_only_equal_sub_structures_against_each_other() -> None:
    plan = plan_for(SCORES, [A, B, C], ratio=0.5)
    # a and b compete for 4 of 8 places, but one channel of a must stay; c competes with nobody.
    assert plan.kept == {"a": (3,), "b": (1, 2, 3), "c": (2, 3)}


def test_global_scope_lets_all_compete() -> None:
    # 6 of 12 leave: the three weak ones of c, then those of a; the best of each layer stays.
    assert plan_for(SCORES, [A, B, C], ratio=0.5, scope="global").kept == {"a": (3,), "c": (3,)}


def test_local_scope_takes_the_same_share_of_every_layer() -> None:
    assert plan_for(SCORES, [A, B, C], ratio=0.5, scope="local").kept == {"a": (2, 3), "b": (2, 3), "c": (2, 3)}


@pytest.mark.parametrize("ratio", [0.0, 0.1, 0.25, 0.3, 0.45, 0.5])
def test_exactly_the_rounded_share_of_a_class_leaves(ratio: float) -> None:
    generator = np.random.default_rng(0)
    units = {name: generator.random(size) for name, size in (("a", 13), ("b", 40), ("c", 7))}
    counts = keep_counts(units, dict.fromkeys(units, 1), ratio)
    assert 60 - sum(counts.values()) == round(60 * ratio)
    # The same by a plain sort: the channels that stay are the best of all.
    ranked = sorted((-score, name) for name, scores in units.items() for score in scores)[: 60 - round(60 * ratio)]
    assert counts == {name: max(1, sum(owner == name for _, owner in ranked)) for name in units}


def test_equal_scores_leave_in_the_order_of_groups_and_channels() -> None:
    groups = [group("a", "s", 4), group("b", "s", 4)]
    assert plan_for({"a": [1] * 4, "b": [1] * 4}, groups, ratio=0.25).kept == {"a": (2, 3)}


def test_a_layer_that_falls_under_the_threshold_whole_keeps_its_best_and_is_not_left_dense() -> None:
    plan = plan_for({"a": [1, 2, 3, 4], "b": [50, 60, 70, 80]}, [A, B], ratio=0.5, min_keep=1)
    assert plan.kept == {"a": (3,), "b": (1, 2, 3)}


def test_min_keep_and_max_ratio_hold_in_every_layer() -> None:
    scores = {"a": [1, 2, 3, 4], "b": [50, 60, 70, 80]}
    assert plan_for(scores, [A, B], ratio=0.5, min_keep=2).kept == {"a": (2, 3), "b": (2, 3)}
    assert plan_for(scores, [A, B], ratio=0.25, max_ratio=0.25).kept == {"a": (1, 2, 3), "b": (1, 2, 3)}
    assert plan_for(scores, [A, B], ratio=1.0, min_keep=3).kept == {"a": (1, 2, 3), "b": (1, 2, 3)}


def test_heads_leave_without_head_dims_and_never_the_last_one() -> None:
    attention = [group("x", "attn", 4, num_heads=2), group("y", "attn", 4, num_heads=2)]
    scores = {"x": [1, 1, 2, 2], "y": [3, 3, 4, 4]}
    plan = plan_for(scores, attention, head_ratio=0.5, head_dim_ratio=0.0)
    assert plan.heads == {"x": (1,), "y": (1,)} and plan.kept == {"x": (2, 3), "y": (2, 3)}
    assert plan_for(scores, attention, head_ratio=1.0, head_dim_ratio=0.0).heads == {"x": (1,), "y": (1,)}


def test_each_head_drops_its_own_weakest_dims_and_all_keep_as_many() -> None:
    attention = [group("x", "attn", 6, num_heads=2)]
    plan = plan_for({"x": [9, 1, 5, 2, 8, 7]}, attention, ratio=0.9, head_dim_ratio=1 / 3)
    assert plan.kept == {"x": (0, 2, 4, 5)} and plan.heads == {"x": (0, 1)}


def test_widths_are_rounded_and_the_class_keeps_its_sum() -> None:
    counts = {"a": 13, "b": 22, "c": 29}
    allowed = {name: [8, 16, 24, 32] for name in counts}
    assert round_counts(counts, allowed) == {"a": 16, "b": 24, "c": 24}
    assert round_counts({"a": 3, "b": 5}, {"a": [4], "b": [8]}) == {"a": 4, "b": 8}


def test_a_layer_narrower_than_the_rounding_stays_whole() -> None:
    groups = [group("a", "x", 4), group("b", "y", 16)]
    plan = plan_for({"a": [1, 2, 3, 4], "b": list(range(16))}, groups, ratio=0.5, round_to=8)
    assert plan.kept == {"b": tuple(range(8, 16))}


def test_rounding_counts_every_group_of_a_grouped_layer() -> None:
    # A channel stands for 4 channels of the layer: 2 of them make a width of 8.
    plan = plan_for({"a": [1, 2, 3, 4]}, [group("a", "x", 4, ways=4)], ratio=0.5, round_to=8)
    assert plan.kept == {"a": (2, 3)}


@pytest.mark.parametrize("family", ["vit", "swin", "resnet", "mobilenet_v2", "hf-convnext"])
@pytest.mark.parametrize(("budget", "round_to"), [("70%", 1), ("50%", 1), ("50%", 2)])
def test_a_budget_is_met_from_below(family: str, budget: str, round_to: int, tmp_path) -> None:
    model = make_base(family, tmp_path)
    groups = trace_groups(model)
    costs = cost_model(model, groups)
    scores = score_groups(model, groups, criterion="l1")
    plan = make_plan(groups, scores, PruneRecipe(target_macs=budget, round_to=round_to), cost=costs)
    share = plan.achieved["pruned"]["macs"] / (costs.base.macs * float(budget[:-1]) / 100)
    assert 0.985 < share <= 1


def test_a_budget_that_cannot_be_reached_names_the_smallest() -> None:
    with pytest.raises(BudgetError, match=r"cannot be reached: the smallest is 3e-08 G"):
        plan_for(SCORES, [A, B, C], target_macs=29)
    with pytest.raises(BudgetError, match="nothing to cut"):
        plan_for(SCORES, [A, B, C], target_macs="1G")
    assert plan_for(SCORES, [A, B, C], target_macs="100%").kept == {}
    assert plan_for(SCORES, [A, B, C], target_macs=30).achieved["pruned"]["macs"] == 30


def test_scores_of_another_model_are_refused() -> None:
    with pytest.raises(RecipeError, match="of another model"):
        plan_for({"a": [1, 2, 3], "b": [1, 2, 3, 4]}, [A, B])
    with pytest.raises(RecipeError, match="no channels"):
        plan_for({}, [])


def test_a_plan_survives_json_and_keeps_lists_on_one_line() -> None:
    plan = plan_for(SCORES, [A, B, C], ratio=0.5)
    text = plan.to_json()
    assert PruningPlan.from_json(text) == plan
    assert '"b": [1, 2, 3]' in text
    assert json.loads(text)["settings"]["scope"] == "isomorphic"
