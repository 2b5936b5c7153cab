import json

import pytest
import torch
from helpers.plans import cost_of, group, plan_for
from helpers.tiny_models import make_base

from isoprune_hf.errors import BudgetError, RecipeError
from isoprune_hf.pruning.cost.macs import cost_model
from isoprune_hf.pruning.deciding.budget import check_budget
from isoprune_hf.pruning.deciding.make_plan import make_plan, recipe_of_scores
from isoprune_hf.pruning.graph.find_groups import trace_groups
from isoprune_hf.pruning.groups import ResidualBlock
from isoprune_hf.pruning.plan import PruningPlan
from isoprune_hf.pruning.scoring.score_groups import score_groups
from isoprune_hf.pruning.scoring.scores import ImportanceScores
from isoprune_hf.recipes import PruneRecipe

A, B, C = group("a", "mlp", 4), group("b", "mlp", 4), group("c", "stream", 4)
SCORES = {"a": [1, 2, 3, 4], "b": [5, 6, 7, 8], "c": [0.1, 0.2, 0.3, 0.4]}


def test_isomorphic_scope_ranks_equal_structures_together() -> None:
    plan = plan_for(SCORES, [A, B, C], ratio=0.5)
    # a and b compete for 4 of 8 places, but one channel of a must stay; c competes with nobody.
    assert plan.kept == {"a": (3,), "b": (1, 2, 3), "c": (2, 3)}


def test_global_scope_lets_all_compete() -> None:
    # 6 of 12 leave: the three weak ones of c, then those of a; the best of each layer stays.
    assert plan_for(SCORES, [A, B, C], ratio=0.5, scope="global").kept == {"a": (3,), "c": (3,)}


def test_local_scope_removes_equal_share_of_layers() -> None:
    assert plan_for(SCORES, [A, B, C], ratio=0.5, scope="local").kept == {"a": (2, 3), "b": (2, 3), "c": (2, 3)}


def test_equal_scores_are_removed_in_channel_order() -> None:
    groups = [group("a", "s", 4), group("b", "s", 4)]
    assert plan_for({"a": [1] * 4, "b": [1] * 4}, groups, ratio=0.25).kept == {"a": (2, 3)}


def test_layer_entirely_below_threshold_keeps_its_best_channel() -> None:
    plan = plan_for({"a": [1, 2, 3, 4], "b": [50, 60, 70, 80]}, [A, B], ratio=0.5, min_keep=1)
    assert plan.kept == {"a": (3,), "b": (1, 2, 3)}


def test_every_layer_respects_min_keep_and_max_ratio() -> None:
    scores = {"a": [1, 2, 3, 4], "b": [50, 60, 70, 80]}
    assert plan_for(scores, [A, B], ratio=0.5, min_keep=2).kept == {"a": (2, 3), "b": (2, 3)}
    assert plan_for(scores, [A, B], ratio=0.25, max_ratio=0.25).kept == {"a": (1, 2, 3), "b": (1, 2, 3)}
    assert plan_for(scores, [A, B], ratio=1.0, min_keep=3).kept == {"a": (1, 2, 3), "b": (1, 2, 3)}


def test_heads_are_removed_but_never_the_last() -> None:
    attention = [group("x", "attn", 4, num_heads=2), group("y", "attn", 4, num_heads=2)]
    scores = {"x": [1, 1, 2, 2], "y": [3, 3, 4, 4]}
    plan = plan_for(scores, attention, head_ratio=0.5, head_dim_ratio=0.0)
    assert plan.heads == {"x": (1,), "y": (1,)} and plan.kept == {"x": (2, 3), "y": (2, 3)}
    assert plan_for(scores, attention, head_ratio=1.0, head_dim_ratio=0.0).heads == {"x": (1,), "y": (1,)}


def test_each_head_drops_its_own_weakest_dims() -> None:
    attention = [group("x", "attn", 6, num_heads=2)]
    plan = plan_for({"x": [9, 1, 5, 2, 8, 7]}, attention, ratio=0.9, head_dim_ratio=1 / 3)
    assert plan.kept == {"x": (0, 2, 4, 5)} and plan.heads == {"x": (0, 1)}


def test_layer_narrower_than_rounding_stays_whole() -> None:
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
    plan = make_plan(
        groups, scores, PruneRecipe(criterion="taylor", target_macs=budget, round_to=round_to), cost=costs
    )
    share = plan.achieved["pruned"]["macs"] / (costs.base.macs * float(budget[:-1]) / 100)
    assert 0.985 < share <= 1


def test_unreachable_budget_names_the_smallest_figure() -> None:
    with pytest.raises(BudgetError, match=r"cannot be reached: the smallest is 3e-08 G"):
        plan_for(SCORES, [A, B, C], target_macs=29)
    with pytest.raises(BudgetError, match="nothing to cut"):
        plan_for(SCORES, [A, B, C], target_macs="1G")
    assert plan_for(SCORES, [A, B, C], target_macs="100%").kept == {}
    assert plan_for(SCORES, [A, B, C], target_macs=30).achieved["pruned"]["macs"] == 30


def test_scores_of_another_model_are_refused() -> None:
    with pytest.raises(RecipeError, match="of another model"):
        plan_for({"a": [1, 2, 3], "b": [1, 2, 3, 4]}, [A, B])
    with pytest.raises(RecipeError, match="no prunable channels"):
        plan_for({}, [])


def test_plan_survives_json_with_one_line_lists() -> None:
    plan = plan_for(SCORES, [A, B, C], ratio=0.5)
    text = plan.to_json()
    assert PruningPlan.from_json(text) == plan
    assert '"b": [1, 2, 3]' in text
    assert json.loads(text)["settings"]["scope"] == "isomorphic"


# Patterns, fixed ratios and normalisers


def test_excluded_groups_still_count_in_their_class() -> None:
    # Half of the 8 channels of the class would leave; b may lose 3 and keeps its best.
    plan = plan_for({"a": [1, 2, 3, 4], "b": [5, 6, 7, 8]}, [A, B], ratio=0.5, exclude=["a"])
    assert plan.kept == {"b": (3,)}


def test_budget_moves_only_groups_without_fixed_ratio() -> None:
    plan = plan_for(SCORES, [A, B, C], target_macs=70, ratios={"c": 0.25})
    assert plan.kept["c"] == (1, 2, 3)
    assert plan.achieved["pruned"]["macs"] == 70
    assert len(plan.kept["a"]) + len(plan.kept["b"]) == 4


def test_custom_scope_lets_unlike_groups_compete() -> None:
    plan = plan_for(SCORES, [A, B, C], ratio=0.5, scopes={"a": "mine", "c": "mine"})
    assert plan.kept == {"a": (1, 2, 3), "b": (2, 3), "c": (3,)}


def test_normalizer_puts_groups_on_one_scale() -> None:
    scores = {"a": [1, 2, 3, 6], "b": [10, 20, 30, 60]}
    assert plan_for(scores, [A, B], ratio=0.25).kept == {"a": (2, 3)}
    assert plan_for(scores, [A, B], ratio=0.25, normalizer="mean").kept == {"a": (1, 2, 3), "b": (1, 2, 3)}
    # Divided by the largest, a is 1/2, 1/2, 1/2, 1 and b is 1/6, 1/3, 1/2, 1.
    scores = {"a": [3, 3, 3, 6], "b": [10, 20, 30, 60]}
    assert plan_for(scores, [A, B], ratio=0.25, normalizer="max").kept == {"b": (2, 3)}


def test_shared_head_dims_are_equal_in_every_head() -> None:
    attention, scores = [group("x", "attn", 6, num_heads=2)], {"x": [9, 1, 5, 2, 8, 7]}
    # By the mean of both heads the dims are worth 5.5, 4.5 and 6.
    plan = plan_for(scores, attention, head_dim_ratio=1 / 3, head_dims="shared")
    assert plan.kept == {"x": (0, 2, 3, 5)}


def test_margins_of_plan_are_those_of_classes() -> None:
    plan = plan_for(SCORES, [A, B, C], ratio=0.25)
    assert plan.margins["a"] == {"removed": 2.0, "kept": 3.0}
    assert plan.margins["c"] == pytest.approx({"removed": 0.1, "kept": 0.2})


def test_margins_do_not_differ_in_last_digits() -> None:
    """Sums in another order, as on other numbers of threads and ranks, are equal to some six digits."""
    plans = [
        plan_for(
            {name: [value * (1 + error) for value in values] for name, values in SCORES.items()}, [A, B, C], ratio=0.25
        )
        for error in (0.0, 3e-7, -3e-7)
    ]
    assert plans[0].margins == plans[1].margins == plans[2].margins


def test_widths_that_cannot_be_aligned_are_said() -> None:
    groups = [group("a", "x", 4), group("b", "y", 16), group("c", "z", 20)]
    scores = {"a": range(4), "b": range(16), "c": range(20)}
    plan = plan_for({name: list(values) for name, values in scores.items()}, groups, ratio=0.05, round_to=8)
    assert plan.notes == (
        "a keeps all of its 4 channels, which is narrower than round_to 8",
        "c keeps all of its 20 channels, no multiple of round_to 8",
    )


# Blocks

WIDE = [group("s.0.mlp", "mlp", 4), group("s.1.mlp", "mlp", 4), group("s.2.mlp", "mlp", 4), group("stem", "stem", 4)]
BLOCKS = [ResidualBlock(f"s.{i}", "Block", (f"s.{i}.mlp.weight",)) for i in range(3)]
WIDE_SCORES = {g.name: [1, 2, 3, 4] for g in WIDE}
BLOCK_SCORES = {"s.0": 3.0, "s.1": 1.0, "s.2": 2.0}


def plan_blocks(**options):
    return plan_for(WIDE_SCORES, WIDE, BLOCKS, BLOCK_SCORES, **options)


def test_lowest_scored_blocks_are_removed_first() -> None:
    plan = plan_blocks(remove_blocks=2, ratio=0.0)
    assert plan.removed_blocks == ("s.1", "s.2") and plan.kept == {}
    assert plan.achieved["pruned"] == {"macs": 80, "params": 80}


def test_named_blocks_leave() -> None:
    assert plan_blocks(remove_blocks=["s.0"], ratio=0.0).removed_blocks == ("s.0",)
    with pytest.raises(RecipeError, match=r"prune\.remove_blocks: 's\.7'"):
        plan_blocks(remove_blocks=["s.7"])


def test_one_block_of_a_stage_stays() -> None:
    with pytest.raises(RecipeError, match=r"prune\.remove_blocks: .*3 blocks; 2 of the 3"):
        plan_blocks(remove_blocks=3)
    assert plan_blocks(remove_blocks="auto", ratio=1.0).removed_blocks == ("s.1", "s.2")


def test_blocks_counted_by_pattern_leave_where_it_matches() -> None:
    assert plan_blocks(remove_blocks={"s.[02]": 1}, ratio=0.0).removed_blocks == ("s.2",)
    # s.1 has the lowest score of all and leaves for the first pattern: the second one takes the next.
    assert plan_blocks(remove_blocks={"s.1": 1, "s.*": 1}, ratio=0.0).removed_blocks == ("s.1", "s.2")
    assert plan_blocks(remove_blocks={"s.*": 0}, ratio=0.0).removed_blocks == ()


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        ({"s.*": 3}, r"remove_blocks\['s\.\*'\]: cannot remove 3 blocks; 2 of the 3"),
        ({"t.*": 1}, r"remove_blocks\['t\.\*'\]: cannot remove 1 blocks; 0 of the 0"),
        ({"s.1": 1, "s.*": 2}, r"remove_blocks\['s\.\*'\]: cannot remove 2 blocks"),
        ({"s.*": -1}, r"remove_blocks\['s\.\*'\] must be a whole number between 0 and 20000, got -1"),
    ],
)
def test_more_blocks_than_a_pattern_has_are_refused(wanted: dict[str, int], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        plan_blocks(remove_blocks=wanted)


def test_blocks_share_the_ratio_of_channels_when_asked() -> None:
    plan = plan_blocks(remove_blocks="auto", ratio=1 / 3)
    assert plan.removed_blocks == ("s.1",)
    # Of the two MLPs that are left, a third of 8 channels leaves.
    assert sum(len(plan.kept[name]) for name in ("s.0.mlp", "s.2.mlp")) == 8 - round(8 / 3)


def test_width_and_depth_share_one_budget() -> None:
    plan = plan_blocks(remove_blocks=1, target_macs=70)
    assert plan.removed_blocks == ("s.1",)
    assert plan.achieved["pruned"]["macs"] == 70


# Budgets


def test_parameters_are_a_budget_too() -> None:
    plan = plan_for(SCORES, [A, B, C], target_params="50%")
    assert plan.achieved["pruned"]["params"] == 60


def test_unused_budget_is_noted_in_the_plan() -> None:
    groups = [group("a", "x", 16)]
    plan = plan_for({"a": list(range(16))}, groups, target_macs=150, round_to=8)
    assert plan.achieved["pruned"]["macs"] == 80
    assert plan.notes == (
        "prune.target_macs 1.5e-07 G: 8e-08 G is reached, 53.3 % of it; no allowed width comes closer (round_to 8, "
        "min_keep 1)",
    )


def test_swap_of_two_groups_meets_budget_closer() -> None:
    # Channels cost 10 and 30. By score, b loses a step first; 200 is met only by a at 8 and b at 4.
    groups = [group("a", "x", 16), group("b", "y", 8, ways=3)]
    plan = plan_for({"a": list(range(16)), "b": [9] * 8}, groups, target_macs=200, round_to=4, ratio=0.5)
    assert plan.achieved["pruned"]["macs"] == 200


def test_only_a_budget_needs_a_cost_model() -> None:
    scores = ImportanceScores({"a": torch.arange(4.0)}, "l1", "print", {})
    assert make_plan([A], scores, PruneRecipe(criterion="taylor", ratio=0.5, round_to=1)).kept == {"a": (2, 3)}
    with pytest.raises(RecipeError, match="target_params needs the cost of `cost_model`"):
        make_plan([A], scores, PruneRecipe(criterion="taylor", target_params="50%"))


def test_impossible_budget_is_refused_before_scoring() -> None:
    with pytest.raises(BudgetError, match=r"target_macs 2e-08 G .* 3e-08 G"):
        check_budget(
            [A, B, C], PruneRecipe(criterion="taylor", target_macs=20, min_keep=1, round_to=1), cost_of([A, B, C])
        )
    check_budget(
        [A, B, C], PruneRecipe(criterion="taylor", target_macs=30, min_keep=1, round_to=1), cost_of([A, B, C])
    )


def test_two_budgets_contradict_each_other() -> None:
    with pytest.raises(RecipeError, match=r"prune\.target_macs .*prune\.target_params"):
        PruneRecipe(criterion="taylor", target_macs="50%", target_params="50%")


# What torch-pruning's own pruner gets wrong (docs/decision.md lists all)


def test_excluded_attention_keeps_its_heads() -> None:
    attention = [group("x", "attn", 4, num_heads=2), group("y", "attn", 4, num_heads=2)]
    scores = {"x": [1, 1, 2, 2], "y": [3, 3, 4, 4]}
    plan = plan_for(scores, attention, head_ratio=0.5, head_dim_ratio=0.0, exclude=["x"])
    assert plan.heads == {"y": (1,)} and plan.kept == {"y": (2, 3)}


@pytest.mark.parametrize(("head_dim", "round_to", "kept"), [(12, 8, 8), (12, 4, 8), (4, 8, 4), (16, 8, 8)])
def test_dims_are_rounded_in_each_head(head_dim: int, round_to: int, kept: int) -> None:
    attention = [group("x", "attn", 4 * head_dim, num_heads=4)]
    plan = plan_for({"x": list(range(4 * head_dim))}, attention, head_dim_ratio=0.4, round_to=round_to)
    assert len(plan.kept.get("x", range(4 * head_dim))) == 4 * kept


def test_deciding_is_repeatable_and_leaves_inputs_untouched() -> None:
    scores = {name: list(values) for name, values in SCORES.items()}
    options = {"target_macs": 90, "ratios": {"c": 0.25}, "exclude": ["a"]}
    first = plan_for(scores, [A, B, C], **options)
    plan_for({"a": [4, 3, 2, 1]}, [group("a", "mlp", 4)], ratio=0.5)
    assert plan_for(scores, [A, B, C], **options) == first
    assert scores == SCORES and options == {"target_macs": 90, "ratios": {"c": 0.25}, "exclude": ["a"]}


def test_fixed_ratio_holds_in_any_scope() -> None:
    scores = {"a": [1, 2, 3, 4], "b": [1, 2, 3, 4], "c": [1, 2, 3, 4]}
    plan = plan_for(scores, [A, B, C], ratio=0.5, scope="global", ratios={"b": 0.25})
    assert plan.kept == {"a": (2, 3), "b": (1, 2, 3), "c": (2, 3)}


# Scores of one criterion, recipes of another


def scores_by(criterion: str, rotated: bool = False) -> ImportanceScores:
    return ImportanceScores({"a": torch.arange(4.0)}, criterion, "print", {}, rotated=rotated)


def test_scores_decide_without_preset_and_criterion() -> None:
    given = PruneRecipe(target_macs="50%", round_to=4)
    for rotated in (False, True):
        used = recipe_of_scores(given, scores_by("l1", rotated=rotated))
        assert used == PruneRecipe(criterion="l1", target_macs="50%", round_to=4, rotate=rotated)
    plan = plan_for({"a": [1, 2, 3, 4]}, [group("a", "x", 4)], criterion=None, ratio=0.5)
    assert plan.settings["allocation"] == "class" and plan.settings["preset"] is None
    assert plan.kept == {"a": (2, 3)}


def test_named_settings_stay_with_other_scores() -> None:
    given = {"allocation": "knapsack", "rotate": False, "reconstruct": "bn"}
    used = recipe_of_scores(PruneRecipe(criterion="taylor", **given), scores_by("l1", rotated=True))
    assert used == PruneRecipe(criterion="l1", **given)


@pytest.mark.parametrize("preset", ["best", "paper", "reference"])
def test_named_preset_refuses_other_scores(preset: str) -> None:
    recipe = PruneRecipe(preset=preset)
    with pytest.raises(RecipeError, match=f"prune.preset {preset} .*criterion .* l1"):
        recipe_of_scores(recipe, scores_by("l1"))
