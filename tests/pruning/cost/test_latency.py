"""The latency model reproduces known times, never decreases with size, and restores hooks and modes."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.tiny_models import make_base, make_images
from torch import nn

from isoprune_hf.checkpoint.modeling_isoprune import IsoPruneForImageClassification
from isoprune_hf.errors import RecipeError
from isoprune_hf.measuring.runtimes.engine import Runtime
from isoprune_hf.pruning.cost.latency import LatencyModel, LatencySettings, find_multiple, fit_latency, fit_times
from isoprune_hf.pruning.cost.layer_times import time_layers
from isoprune_hf.pruning.cost.macs import CostModel, ModelCost, RemovedUnits, Term, cost_model
from isoprune_hf.pruning.graph.find_groups import trace_groups
from isoprune_hf.pruning.graph.widths import Tie, Width
from isoprune_hf.pruning.prune import prune_model
from isoprune_hf.recipes import PruneRecipe

# Layer -> (milliseconds while it is there, milliseconds for a MAC), and the MACs of three variants.
TRUE = {"fc1": (0.5, 0.001), "fc2": (0.25, 0.002), "attn": (1.0, 0.0)}
MACS = [
    {"fc1": 1000, "fc2": 500, "attn": 64},
    {"fc1": 600, "fc2": 300, "attn": 32},
    {"fc1": 200, "fc2": 400, "attn": 16},
]


def spend(macs: dict[str, int]) -> dict[str, float]:
    return {name: TRUE[name][0] + TRUE[name][1] * count for name, count in macs.items() if count}


def total(macs: dict[str, int]) -> float:
    return 2.0 + 1.5 * sum(spend(macs).values())


def layer_macs(model: IsoPruneForImageClassification) -> dict[str, int]:
    """Return the MACs by layer, from the attributes of each layer and the sizes of its inputs."""
    found: dict[str, int] = {}

    def linear(name: str):
        return lambda module, inputs, output: found.update({name: output.numel() * module.in_features})

    def attention(name: str):
        def count(module: nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
            tokens = output.shape[1]
            found[name] = 2 * tokens * tokens * module.proj.in_features

        return count

    hooks = []
    for name, module in model.model.named_modules():
        if isinstance(module, nn.Linear):
            hooks.append(module.register_forward_hook(linear(name)))
        elif name.endswith(".attn"):
            hooks.append(module.register_forward_hook(attention(name)))
    model(make_images(model, 1))
    for hook in hooks:
        hook.remove()
    return found


@pytest.fixture(scope="module")
def variants(tmp_path_factory: pytest.TempPathFactory) -> list[tuple[IsoPruneForImageClassification, dict[str, int]]]:
    base = make_base("vit", tmp_path_factory.mktemp("base"))
    recipes = [PruneRecipe(criterion="l1", ratio=ratio, round_to=1) for ratio in (0.3, 0.6)]
    models = [base, *(prune_model(base, recipe).model for recipe in recipes)]
    return [(model, layer_macs(model)) for model in models]


def test_known_times_come_back_exactly() -> None:
    fitted = fit_times(MACS, [spend(macs) for macs in MACS], [total(macs) for macs in MACS])
    assert fitted.fixed == pytest.approx(2.0)
    for name, line in TRUE.items():  # the whole model takes 1.5 times what its layers take
        assert fitted.layers[name] == pytest.approx((1.5 * line[0], 1.5 * line[1]), abs=1e-9)
    unseen = {"fc1": 800, "fc2": 100, "attn": 48}
    assert fitted.predict(unseen) == pytest.approx(total(unseen))


def test_removed_layer_takes_no_time() -> None:
    fitted = fit_times(MACS, [spend(macs) for macs in MACS], [total(macs) for macs in MACS])
    assert fitted.predict({**MACS[0], "fc1": 0}) == pytest.approx(total(MACS[0]) - 1.5 * (0.5 + 0.001 * 1000))
    assert fitted.predict({name: MACS[0][name] for name in ("fc1", "attn")}) == pytest.approx(
        total({"fc1": 1000, "attn": 64})
    )


def test_variant_without_layer_is_not_fitted_to_it() -> None:
    macs = [*MACS, {"fc1": 300, "fc2": 0, "attn": 8}, {"fc1": 700, "attn": 8}]
    fitted = fit_times(macs, [spend(variant) for variant in macs], [total(variant) for variant in macs])
    assert fitted.layers["fc2"] == pytest.approx((1.5 * 0.25, 1.5 * 0.002))


def test_negative_slopes_and_intercepts_become_zero() -> None:
    macs = [{"falls": 10, "steep": 10}, {"falls": 20, "steep": 20}]
    times = [{"falls": 3.0, "steep": 1.0}, {"falls": 1.0, "steep": 4.0}]
    fitted = fit_times(macs, times, [4.0, 5.0])
    # falls: the mean of 3 and 1; steep through zero: (10 x 1 + 20 x 4) / (100 + 400) for each MAC.
    factor = fitted.layers["falls"][0] / 2.0
    assert fitted.layers["falls"][1] == 0.0
    assert fitted.layers["steep"] == pytest.approx((0.0, factor * 0.18))
    # Sums of the layers are 3.8 and 5.6, so totals of 4 and 5 give a slope of 1 / 1.8.
    assert factor == pytest.approx(1 / 1.8)
    assert fitted.fixed == pytest.approx(4.5 - 4.7 / 1.8)


def test_time_of_single_variant_is_shared_by_macs() -> None:
    fitted = fit_times(MACS[:1], [spend(MACS[0])], [10.0])
    assert fitted.predict(MACS[0]) == pytest.approx(10.0)
    spent = sum(spend(MACS[0]).values())
    assert fitted.fixed == pytest.approx(10.0 - spent)
    assert fitted.predict({"fc1": 500, "fc2": 250, "attn": 32}) == pytest.approx(10.0 - spent / 2)
    overhead = fit_times(MACS[:1], [spend(MACS[0])], [spent / 2])  # timing the layers slowed them down
    assert overhead.fixed == 0.0 and overhead.predict(MACS[0]) == pytest.approx(spent / 2)


def test_a_prediction_never_falls_when_a_layer_grows() -> None:
    random = np.random.default_rng(0)
    for _ in range(50):
        times = [{name: float(random.uniform(0, 5)) for name in macs} for macs in MACS]
        fitted = fit_times(MACS, times, random.uniform(0, 20, 3).tolist())
        assert fitted.fixed >= 0
        for name in TRUE:
            sizes = [fitted.predict({**MACS[1], name: macs}) for macs in (0, 1, 10, 600, 5000)]
            assert sizes == sorted(sizes)


def test_real_model_is_fitted_and_not_changed(
    variants: list[tuple[IsoPruneForImageClassification, dict[str, int]]],
) -> None:
    base = variants[0][0]
    base.train()
    base.model.head.eval()
    fitted = fit_latency(base, variants, LatencySettings(2, Runtime(dtype="bf16")), repeats=3)
    assert base.training and base.model.blocks[0].training and not base.model.head.training
    assert base.dtype == torch.float32
    base.eval()
    for model, macs in variants:
        assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
        assert fitted.predict(macs) > 0
    expected = {"blocks.0.attn", "blocks.0.attn.qkv", "blocks.1.mlp.fc2", "head"}
    assert expected <= fitted.layers.keys() == variants[0][1].keys()
    assert fitted.record == {
        "device": "cpu",
        "threads": torch.get_num_threads(),
        "batch_size": 2,
        "precision": "bf16",
        "backend": "eager",
        "torch": torch.__version__,
        "repeats": 3,
    }


def test_attention_counts_without_its_projections(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    # A clock that moves on by one second whenever it is read: a layer takes 1 s, and each module inside attention
    # adds two readings; so the whole attention takes 1 s for itself and 1 s for each of its modules, plus the gaps.
    base = make_base("vit", tmp_path)
    seconds = iter(range(10_000))
    monkeypatch.setattr("isoprune_hf.pruning.cost.layer_times.time.perf_counter", lambda: next(seconds))
    times = time_layers([(base, {"blocks.0.attn": 1, "blocks.0.attn.qkv": 1, "head": 1})], (3, 16, 16), repeats=1)[0]
    called = []
    for name, module in base.model.blocks[0].attn.named_children():
        module.register_forward_hook(lambda *_, name=name: called.append(name))
    base(make_images(base, 1))
    assert times["head"] == times["blocks.0.attn.qkv"] == 1000
    # 2 readings inside for each module: the attention spans 2 n + 1 seconds, n of them inside modules.
    assert times["blocks.0.attn"] == 1000 * (len(called) + 1)


def test_cost_and_latency_speak_of_the_same_layers(tmp_path: Path) -> None:
    base = make_base("vit", tmp_path)
    cost = cost_model(base, trace_groups(base))
    assert cost.layer_macs({}, {}).keys() == layer_macs(base).keys() | {"patch_embed.proj"}


@pytest.mark.parametrize(("name", "low"), [("batch_size", 1), ("repeats", 1)])
def test_a_number_that_is_too_small_is_refused(name: str, low: int) -> None:
    with pytest.raises(RecipeError, match=f"{name} must be at least {low}, got {low - 1}"):
        time_layers([], (3, 4, 4), **{name: low - 1})


def test_time_of_model_is_sum_of_layers() -> None:
    model = LatencyModel(1.0, {"a": (0.5, 0.25), "b": (2.0, 0.0)})
    assert model.predict({"a": 4, "b": 7}) == 1.0 + 0.5 + 1.0 + 2.0


# A layer of 16 to 64 channels whose kernel computes blocks of 16: 1 ms for each begun block, and 2 ms besides. The
# first three widths are multiples of 16.
WIDTHS = (64, 32, 16, 40, 24)
BLOCKS = [{"conv": 2.0 + math.ceil(width / 16)} for width in WIDTHS]


def rounded_up(multiple: int) -> list[dict[str, int]]:
    """Return the MACs of the widths, 10 for each channel, rounded up to a multiple."""
    return [{"conv": 10 * math.ceil(width / multiple) * multiple} for width in WIDTHS]


def test_blocks_of_kernels_are_found() -> None:
    macs = {multiple: rounded_up(multiple) for multiple in (1, 16, 32)}
    assert find_multiple(macs, BLOCKS) == find_multiple(macs, BLOCKS, 3) == 16
    # The times of single channels: 40 and 24 are no exceptions.
    linear = [{"conv": 2.0 + width / 16} for width in WIDTHS]
    assert find_multiple(macs, linear) == find_multiple(macs, linear, 3) == 1
    assert find_multiple(macs, [{"conv": 0.0}] * 5) == 1


def test_multiples_of_equal_misfit_are_not_believed() -> None:
    # Without widths inside blocks both explain the times: the plain MACs are kept.
    macs = {multiple: rounded_up(multiple)[:3] for multiple in (1, 16)}
    assert find_multiple(macs, BLOCKS[:3]) == 1
    noise = [{"conv": times["conv"] + error} for times, error in zip(BLOCKS, (0, 2, -2, 2, -2), strict=True)]
    macs = {multiple: rounded_up(multiple) for multiple in (1, 16)}
    assert find_multiple(macs, noise) == 1


def test_cut_is_predicted_by_whole_blocks() -> None:
    width = Width(40, (Tie("a", 1, "channel"),))
    cost = CostModel(ModelCost(120, 0), [Term("conv", (Width(3), width))], [], {"a": (40, 0)})
    model = LatencyModel(1.0, {"conv": (0.5, 0.25)}, multiple=16)
    assert model.predict_cut(cost) == 1.0 + 0.5 + 0.25 * 3 * 48
    removed = {count: model.predict_cut(cost, RemovedUnits({"a": count}, {}, ())) for count in (7, 8, 24)}
    assert removed == {7: 1.5 + 0.75 * 48, 8: 1.5 + 0.75 * 32, 24: 1.5 + 0.75 * 16}
    assert cost.layer_macs({"a": 7}, {}) == {"conv": 99} and cost.cost({"a": 7}, {}).macs == 99
