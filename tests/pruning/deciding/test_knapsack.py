"""The allocation knapsack, compared with an exhaustive search over widths."""

import itertools

import numpy as np
import pytest
import torch
from helpers.marks import one_of_each
from helpers.plain_knapsack import plain_round
from helpers.plans import cost_of, group
from helpers.tiny_models import ALL_FAMILIES, FAMILIES, make_base

from isoprune_hf.errors import BudgetError, IsoPruneError, RecipeError
from isoprune_hf.pruning.cost.latency import LatencyModel
from isoprune_hf.pruning.cost.macs import CostModel, ModelCost, Term, cost_model
from isoprune_hf.pruning.deciding import knapsack
from isoprune_hf.pruning.deciding.make_plan import make_plan
from isoprune_hf.pruning.graph.blocks import find_blocks
from isoprune_hf.pruning.graph.find_groups import trace_groups
from isoprune_hf.pruning.graph.widths import Tie, Width
from isoprune_hf.pruning.groups import CoupledGroup
from isoprune_hf.pruning.plan import PruningPlan
from isoprune_hf.pruning.scoring.score_groups import score_groups
from isoprune_hf.pruning.scoring.scores import ImportanceScores
from isoprune_hf.recipes import PruneRecipe

# Seeds of a comparison with plain code: one always, two by `make test-all`, the others by `make test-faults`.
SEEDS = [0, *(pytest.param(n, marks=pytest.mark.families if n < 3 else pytest.mark.faults) for n in range(1, 10))]
SIZES = {"a": 14, "b": 10, "c": 12}


def solve(groups, cost, scores, latency=None, blocks=(), **options) -> PruningPlan:
    recipe = PruneRecipe(**{"criterion": "taylor", "round_to": 1, "min_keep": 1, "allocation": "knapsack", **options})
    values = {name: torch.as_tensor(value, dtype=torch.float32) for name, value in scores.items()}
    known = ImportanceScores(values, "gate_fisher", "print", {}, blocks={block.name: 0.0 for block in blocks})
    return make_plan(groups, known, recipe, cost=cost, latency=latency, blocks=blocks)


def widths(plan: PruningPlan, groups) -> dict[str, int]:
    return {g.name: len(plan.kept.get(g.name, range(g.channels))) for g in groups}


def chain(sizes: dict[str, int]) -> tuple[list[CoupledGroup], CostModel]:
    """Build a net 3 -> a -> b -> c -> 5 without biases; its MACs equal its weights, products of adjacent widths."""
    groups = [group(name, f"layer {name}", size) for name, size in sizes.items()]
    ends = [Width(3), *(Width(size, (Tie(name, 1, "channel"),)) for name, size in sizes.items()), Width(5)]
    terms = [Term(name, pair) for name, pair in zip([*sizes, "out"], itertools.pairwise(ends), strict=True)]
    numbers = [3, *sizes.values(), 5]
    total = sum(x * y for x, y in itertools.pairwise(numbers))
    return groups, CostModel(
        ModelCost(total, total), terms, terms, {name: (size, 0) for name, size in sizes.items()}, []
    )


def loss_of(scores, kept: dict[str, int]) -> float:
    return sum(float(np.sort(values)[: len(values) - kept[name]].sum()) for name, values in scores.items())


def draw(seed: int, sizes: dict[str, int]) -> dict[str, np.ndarray]:
    """Draw losses whose scale differs between layers, as for real networks."""
    rng = np.random.default_rng(seed)
    return {name: rng.lognormal(0, 1, size) * 10 ** rng.uniform(-1, 1) for name, size in sizes.items()}


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("share", [0.7, 0.4])
def test_no_widths_of_chain_lose_much_less(seed: int, share: float) -> None:
    # What a channel saves depends on its neighbours, so greedy may miss the best: by a few per cent of all loss.
    groups, cost = chain(SIZES)
    scores = draw(seed, SIZES)
    plan = solve(groups, cost, scores, target_macs=f"{100 * share}%")
    found, target = widths(plan, groups), round(share * cost.base.macs)

    def macs(kept: dict[str, int]) -> int:
        return sum(x * y for x, y in itertools.pairwise([3, *kept.values(), 5]))

    assert plan.achieved["pruned"]["macs"] == macs(found) <= target
    every = (
        dict(zip(SIZES, tried, strict=True)) for tried in itertools.product(*(range(1, n + 1) for n in SIZES.values()))
    )
    best = min(loss_of(scores, kept) for kept in every if macs(kept) <= target)
    assert best <= loss_of(scores, found) * (1 + 1e-6)
    assert loss_of(scores, found) <= best + 0.04 * loss_of(scores, dict.fromkeys(SIZES, 0))
    # The kept channels are the best ones.
    for name, kept in plan.kept.items():
        assert sorted(kept) == sorted(np.argsort(scores[name], kind="stable")[-len(kept) :].tolist())


@pytest.mark.parametrize("seed", range(4))
def test_channels_of_equal_cost_leave_by_loss(seed: int) -> None:
    # Ten MACs each: the least loss is that of the weakest channels of all, and greedy finds it.
    groups = [group(name, f"layer {name}", size) for name, size in SIZES.items()]
    scores = draw(seed, SIZES)
    plan = solve(groups, cost_of(groups), scores, target_macs="50%")
    assert sum(widths(plan, groups).values()) == 18
    weakest = np.sort(np.concatenate([np.sort(values)[:-1] for values in scores.values()]))[:18]
    assert loss_of(scores, widths(plan, groups)) == pytest.approx(weakest.sum(), rel=1e-5)


def test_what_costs_more_leaves_first_at_equal_loss() -> None:
    # Channels of a stand for four rows of its layer, those of b for one.
    groups = [group("a", "x", 8, ways=4), group("b", "y", 8)]
    plan = solve(groups, cost_of(groups), {"a": np.ones(8), "b": np.ones(8)}, target_macs="60%")
    assert widths(plan, groups) == {"a": 4, "b": 8}
    by_class = solve(
        groups, cost_of(groups), {"a": np.ones(8), "b": np.ones(8)}, target_macs="60%", allocation="class"
    )
    assert widths(by_class, groups) != widths(plan, groups)


def draw_decision(rng: np.random.Generator, groups, cost, blocks):
    """Draw scores with or without ties or negative values, and settings and a budget of every kind."""
    kind = rng.choice(["lognormal", "ties", "normal"])
    scores = {}
    for g in groups:
        values = {
            "lognormal": rng.lognormal(0, 1, g.channels) * 10 ** rng.uniform(-1, 1),
            "ties": rng.integers(0, 4, g.channels),
            "normal": np.append(rng.normal(1, 1, g.channels - 1), 1.0),
        }
        scores[g.name] = values[kind]
    options = {
        "normalizer": "none",
        "round_to": int(rng.choice([1, 1, 2, 3, 4, 8])),
        "min_keep": int(rng.choice([1, 2, 4])),
        "max_ratio": float(rng.choice([0.5, 0.9, 1.0])),
        "head_ratio": float(rng.choice([0.0, 0.5, 0.9])),
        "head_dims": str(rng.choice(["per_head", "shared", "shared_all"])),
        "rounding": str(rng.choice(["balanced", "down"])),
        "layout": "uniform" if rng.random() < 0.2 else "per-layer",
        "ratios": {groups[rng.integers(len(groups))].name: 0.25} if rng.random() < 0.2 else {},
        "remove_blocks": 1 if blocks and rng.random() < 0.2 else None,
    }
    share = f"{rng.integers(25, 98)}%"
    budget = str(rng.choice(["macs", "params", "latency", "ratio"]))
    if budget == "ratio":
        return scores, {**options, "ratio": 0.4}, None
    if budget != "latency":
        return scores, {**options, f"target_{budget}": share}, None
    times = {name: (rng.uniform(0, 0.01), rng.uniform(1e-7, 1e-5)) for name in cost.layer_macs({}, {})}
    return scores, {**options, "target_latency": share, "latency_batch_size": 1}, LatencyModel(1.0, times)


@pytest.mark.parametrize("family", one_of_each(ALL_FAMILIES, "vit", "resnet", "mobilenet_v2"))
@pytest.mark.parametrize("seed", SEEDS)
def test_plans_equal_those_of_plain_rounds(family: str, seed: int, tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_base(family, tmp_path)
    groups, blocks = trace_groups(model), find_blocks(model)
    cost = cost_model(model, groups, blocks)
    rng = np.random.default_rng(seed)
    compared = 0
    while compared < 3:
        scores, options, latency = draw_decision(rng, groups, cost, blocks)
        try:
            plan = solve(groups, cost, scores, latency, blocks=blocks, **options)
        except IsoPruneError:  # blocks that differ, or a budget below the floors
            continue
        with monkeypatch.context() as patch:
            patch.setattr(knapsack, "next_allocation", plain_round)
            assert solve(groups, cost, scores, latency, blocks=blocks, **options).to_json() == plan.to_json()
        compared += 1


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("figure", ["macs", "params"])
def test_budget_is_met_from_below_within_half_percent(family: str, figure: str, tmp_path) -> None:
    model = make_base(family, tmp_path)
    groups = trace_groups(model)
    cost = cost_model(model, groups)
    scores = score_groups(model, groups, criterion="random").scores
    plan = solve(groups, cost, scores, **{f"target_{figure}": "60%"})
    reached, target = plan.achieved["pruned"][figure], 0.6 * getattr(cost.base, figure)
    assert 0.995 * target <= reached <= target
    assert plan.notes == () and plan.settings["allocation"] == "knapsack"
    assert all(len(plan.heads[g.name]) == g.num_heads for g in groups if g.name in plan.heads)


@pytest.fixture(scope="module")
def vit(tmp_path_factory: pytest.TempPathFactory):
    model = make_base("vit", tmp_path_factory.mktemp("base"))
    groups = trace_groups(model)
    return groups, cost_model(model, groups), score_groups(model, groups, criterion="random").scores


def test_floors_and_steps_of_widths_hold(vit) -> None:
    groups, cost, scores = vit
    options = {"target_macs": "60%", "min_keep": 3, "max_ratio": 0.5, "round_to": 4, "exclude": ["blocks.0.mlp*"]}
    plan = solve(groups, cost, scores, **options)
    assert "blocks.0.mlp.fc1" not in plan.kept and plan.kept
    for g in groups:
        if g.name in plan.kept:
            width, size = len(plan.kept[g.name]) // (g.num_heads or 1), g.head_dim or g.channels
            assert width % 4 == 0 and width >= 3 and size - width <= 0.5 * size
    assert plan.achieved["pruned"]["macs"] <= 0.6 * cost.base.macs
    with pytest.raises(BudgetError, match=r"target_macs .* max_ratio 0\.25"):
        solve(groups, cost, scores, target_macs="40%", max_ratio=0.25)


def test_a_fixed_ratio_stays_fixed(vit) -> None:
    groups, cost, scores = vit
    plan = solve(groups, cost, scores, target_macs="60%", ratios={"blocks.0.mlp*": 0.25})
    assert len(plan.kept["blocks.0.mlp.fc1"]) == 96
    assert 0.99 * 0.6 * cost.base.macs <= plan.achieved["pruned"]["macs"] <= 0.6 * cost.base.macs


def test_kinds_with_the_ratio_zero_stay_whole(vit) -> None:
    groups, cost, scores = vit
    plan = solve(groups, cost, scores, target_macs="60%", head_ratio=0.0, head_dim_ratio=0.0)
    assert "blocks.0.attn" not in plan.kept and "blocks.1.attn" not in plan.kept and plan.kept
    attentions = [g for g in groups if g.num_heads]
    plan = solve(groups, cost, scores, target_macs="97%", ratio=0.0, head_dim_ratio=0.5)
    assert plan.kept.keys() <= {g.name for g in attentions}


def test_whole_heads_leave_where_they_may() -> None:
    # Head 1 of x loses nothing, and neither do single dims of the others: one head is as cheap as its dims.
    attention = [group("x", "attn", 8, num_heads=2), group("y", "attn", 8, num_heads=2)]
    scores = {"x": [9, 9, 9, 9, 1e-6, 1e-6, 1e-6, 1e-6], "y": [9] * 8}
    options = {"target_macs": "75%", "head_dim_ratio": 0.0}
    plan = solve(attention, cost_of(attention), scores, head_ratio=0.5, **options)
    assert plan.heads["x"] == (0,) and plan.kept["x"] == (0, 1, 2, 3)
    assert "y" not in plan.kept
    with pytest.raises(BudgetError, match="cannot be reached"):
        solve(attention, cost_of(attention), scores, head_ratio=0.0, **options)
    with pytest.raises(BudgetError, match="cannot be reached"):  # the last head never leaves
        solve(attention, cost_of(attention), scores, head_ratio=1.0, head_dim_ratio=0.0, target_macs="40%")


@pytest.mark.parametrize("family", ["vit", "resnet"])
def test_knapsack_without_budget_keeps_macs_of_class(family: str, tmp_path) -> None:
    model = make_base(family, tmp_path)
    groups = trace_groups(model)
    cost = cost_model(model, groups)
    scores = score_groups(model, groups, criterion="random").scores
    by_class, pooled = (
        solve(groups, cost, scores, ratio=0.4, head_ratio=0.25, allocation=allocation)
        for allocation in ("class", "knapsack")
    )
    target = by_class.achieved["pruned"]["macs"]
    assert 0.995 * target <= pooled.achieved["pruned"]["macs"] <= target
    assert pooled.kept != by_class.kept


def test_latency_budget_is_met_by_layer_times(vit) -> None:
    groups, cost, scores = vit
    macs = cost.layer_macs({}, {})
    layer = next(name for name in macs if name.endswith("mlp.fc1"))
    # Milliseconds: 1 to start with, then one for a million MACs, and ten for those of one layer.
    latency = LatencyModel(1.0, {name: (0.0, 1e-5 if name == layer else 1e-6) for name in macs})
    base = 1.0 + sum(value * (1e-5 if name == layer else 1e-6) for name, value in macs.items())
    assert latency.predict(macs) == pytest.approx(base)
    same = {name: torch.ones_like(value) for name, value in scores.items()}
    options = {"target_latency": "85%", "latency_batch_size": 1, "exclude": ["patch_embed*"]}
    plan = solve(groups, cost, same, latency=latency, **options)
    removed = {g.name: g.channels - len(plan.kept.get(g.name, range(g.channels))) for g in groups}
    left = cost.layer_macs(removed, {})
    reached = 1.0 + sum(value * (1e-5 if name == layer else 1e-6) for name, value in left.items())
    assert 0.99 * 0.85 * base <= reached <= 0.85 * base
    # At equal losses the slow layer gives up more than its twin.
    slow, twin = (f"blocks.{number}.mlp.fc1" for number in ((0, 1) if ".0." in f".{layer}" else (1, 0)))
    assert removed[slow] > removed[twin]


def test_stepped_latency_ends_at_the_floors(vit) -> None:
    # Only all of a net's layers together get faster: as steps of a measured time may.
    groups, cost, scores = vit

    class Steps(LatencyModel):
        def predict(self, macs: dict[str, int]) -> float:
            return 10.0 if sum(macs.values()) > 0.05 * cost.base.macs else 1.0

    plan = solve(groups, cost, scores, latency=Steps(0.0, {}), target_latency="5ms")
    assert plan.achieved["pruned"]["macs"] <= 0.05 * cost.base.macs


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"selection": "threshold"},
            "compares losses as they are: set prune.selection exact or prune.allocation class, got threshold",
        ),
        (
            {"normalizer": "mean"},
            "compares losses as they are: set prune.normalizer none or prune.allocation class, got mean",
        ),
        ({"remove_blocks": "auto"}, "prune.remove_blocks"),
    ],
)
def test_settings_that_contradict_a_knapsack_are_refused(options: dict[str, str], message: str) -> None:
    with pytest.raises(RecipeError) as caught:
        PruneRecipe(allocation="knapsack", **options)
    assert str(caught.value).startswith("prune.allocation knapsack ") and message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_knapsack_needs_the_cost_of_the_base() -> None:
    groups = [group("a", "x", 4)]
    with pytest.raises(RecipeError, match=r"prune\.allocation knapsack .*`cost_model`"):
        solve(groups, None, {"a": np.ones(4)}, ratio=0.5)


def test_a_budget_of_the_whole_base_keeps_everything(vit) -> None:
    groups, cost, scores = vit
    assert solve(groups, cost, scores, target_macs="100%").kept == {}
    with pytest.raises(BudgetError, match="nothing to cut"):
        solve(groups, cost, scores, target_macs="99G")


@pytest.mark.parametrize("seed", range(3))
def test_latency_of_blocks_takes_their_multiples(seed: int) -> None:
    # Kernels compute 16 channels at once: 200 of the base take as long as 208; other widths are multiples of 16.
    sizes = {"a": 200, "b": 120, "c": 328}
    groups, cost = chain(sizes)
    scores = draw(seed, sizes)
    latency = LatencyModel(1.0, dict.fromkeys((*sizes, "out"), (0.5, 1e-3)), multiple=16)

    def time(kept: dict[str, int]) -> float:
        ends = [3, *(-(-width // 16) * 16 for width in kept.values()), 5]
        return 1.0 + 4 * 0.5 + 1e-3 * sum(x * y for x, y in itertools.pairwise(ends))

    target = 0.6 * time(sizes)
    plan = solve(groups, cost, scores, latency=latency, target_latency="60%", latency_batch_size=1, round_to=8)
    found = widths(plan, groups)
    assert time(found) <= target
    every = itertools.product(*([*range(16, size, 16), size] for size in sizes.values()))
    tried = (dict(zip(sizes, kept, strict=True)) for kept in every)
    best = min(loss_of(scores, kept) for kept in tried if time(kept) <= target)
    assert best * (1 - 1e-6) <= loss_of(scores, found) <= best + 0.04 * loss_of(scores, dict.fromkeys(sizes, 0))
    assert [note for note in plan.notes if note.startswith("widths are multiples of 16, not only of round_to 8")]
    assert plan.settings["round_to"] == 16
    # A budget of MACs keeps the multiples of 8.
    by_macs = solve(groups, cost, scores, latency=latency, target_macs="60%", round_to=8)
    assert by_macs.settings["round_to"] == 8 and any(kept % 16 == 8 for kept in widths(by_macs, groups).values())
