import pytest
import torch

from isoprune_hf.pruning.cost.macs import CostModel, ModelCost
from isoprune_hf.pruning.deciding.iterative import lift_scores, recipe_of_step
from isoprune_hf.pruning.plan import PruningPlan
from isoprune_hf.pruning.scoring.scores import ImportanceScores
from isoprune_hf.recipes import PruneRecipe

COST = CostModel(ModelCost(1000, 400), 0, {}, {}, {})


def scores(fingerprint: str = "base", blocks=None, **values) -> ImportanceScores:
    return ImportanceScores(
        {name: torch.tensor(v, dtype=torch.float32) for name, v in values.items()}, "l1", fingerprint, {}, blocks or {}
    )


def test_removed_channels_rank_below_fresh_scores() -> None:
    lifted = lift_scores(
        scores(a=[5.0, 1.0, 7.0, 2.0]), PruningPlan({"a": (0, 2)}, {}), scores("smaller", a=[0.0, 9.0])
    )
    values = lifted.scores["a"].tolist()
    assert (values[0], values[2]) == (0.0, 9.0)
    assert values[1] < values[3] < 0
    assert lifted.fingerprint == "base"


def test_channels_removed_earlier_rank_lower() -> None:
    once = lift_scores(scores(a=[3.0, 4.0, 5.0, 6.0]), PruningPlan({"a": (0, 1, 3)}, {}), scores(a=[3.0, 1.0, 6.0]))
    twice = lift_scores(once, PruningPlan({"a": (0, 3)}, {}), scores(a=[2.0, 8.0]))
    values = twice.scores["a"].tolist()
    assert values[2] < values[1] < 0 <= values[0] == 2.0 < values[3] == 8.0


def test_small_scores_keep_their_order_when_they_sink() -> None:
    tiny = [3e-9, 1e-9, 2e-9, 4e-9]
    lifted = lift_scores(scores(a=tiny), PruningPlan({"a": (3,)}, {}), scores(a=[4e-9]))
    assert lifted.scores["a"][:3].argsort().tolist() == [1, 2, 0]


def test_removed_groups_and_blocks_sink_too() -> None:
    before = scores(blocks={"s.0": 1.0, "s.1": 2.0}, a=[1.0, 2.0], b=[1.0, 2.0])
    lifted = lift_scores(before, PruningPlan({}, {}, ("s.0",)), scores(blocks={"s.1": 5.0}, b=[7.0, 8.0]))
    assert lifted.blocks["s.0"] < 0 and lifted.blocks["s.1"] == 5.0
    assert (lifted.scores["a"] < 0).all() and lifted.scores["b"].tolist() == [7.0, 8.0]


def test_step_applies_its_share_of_ratios() -> None:
    recipe = PruneRecipe(criterion="taylor", ratio=0.6, head_ratio=0.3, ratios={"x": 0.9}, remove_blocks=5, steps=3)
    step = recipe_of_step(recipe, 2, COST)
    assert (step.ratio, step.head_ratio) == pytest.approx((0.4, 0.2))
    assert step.head_dim_ratio is None and step.ratios == pytest.approx({"x": 0.6})
    assert (step.remove_blocks, step.round_to) == (3, 1)
    by_pattern = recipe_of_step(PruneRecipe(criterion="taylor", remove_blocks={"stages.2.*": 18}, steps=3), 1, COST)
    assert by_pattern.remove_blocks == {"stages.2.*": 6}


def test_step_covers_its_share_of_the_budget() -> None:
    step = recipe_of_step(PruneRecipe(criterion="taylor", target_macs="40%", ratio=0.3, steps=4), 1, COST)
    assert (step.target_macs, step.ratio) == (1000 - 600 / 4, 0.3)
    assert recipe_of_step(PruneRecipe(criterion="taylor", target_params="100", steps=2), 1, COST).target_params == 250
