from pathlib import Path
from types import SimpleNamespace

import pytest
from helpers.tiny_models import make_base
from torch import nn

from isoprune_hf.errors import BudgetError
from isoprune_hf.measuring.onnx_profile import LayerTimes
from isoprune_hf.pruning.cost import latency, latency_cache
from isoprune_hf.pruning.cost.latency import LatencyModel, LatencySettings
from isoprune_hf.pruning.cost.macs import CostModel, ModelCost, Term, cost_model
from isoprune_hf.pruning.graph.find_groups import trace_groups
from isoprune_hf.pruning.graph.widths import Width
from isoprune_hf.pruning.latency_budget import MeasuredPair, fit_base, meet_latency
from isoprune_hf.pruning.plan import PruningPlan
from isoprune_hf.recipes import PruneRecipe

# A base that is predicted to take 100 ms.
COST = CostModel(ModelCost(100, 10), [Term("a", (Width(100),))], [Term("a", (Width(10),))])
LATENCY = LatencyModel(0.0, {"a": (0.0, 1.0)}, {"device": "cpu"})
ACHIEVED = {"base": {"macs": 100, "params": 10}, "pruned": {"macs": 1, "params": 1}}


def meet(measured, target, smallest=0.0):
    """Meet a target; a cut that aims at x ms takes measured(x) = (base ms, cut ms)."""
    aims = []

    def attempt(recipe: PruneRecipe) -> tuple[PruningPlan, SimpleNamespace]:
        aims.append(recipe.target_latency)
        if recipe.target_latency < smallest:
            raise BudgetError("too small")
        plan = PruningPlan({}, {}, achieved=ACHIEVED, settings={"target_latency": recipe.target_latency})
        return plan, SimpleNamespace(aim=recipe.target_latency)

    plan, pruned = meet_latency(
        PruneRecipe(criterion="taylor", target_latency=target),
        COST,
        LATENCY,
        attempt=attempt,
        measure=lambda pruned: MeasuredPair(*measured(pruned.aim)),
    )
    return plan, pruned, aims


def test_cut_that_measures_as_predicted_is_accepted() -> None:
    plan, pruned, aims = meet(lambda aim: (100.0, aim), "60ms")
    assert aims == [60.0] and pruned.aim == 60.0
    assert plan.achieved["pruned"] == {"macs": 1, "params": 1, "latency_ms": 60.0}
    assert plan.achieved["base"]["latency_ms"] == 100.0
    assert (plan.settings["target_latency"], plan.settings["latency"]) == ("60ms", {"device": "cpu"})


def test_busy_machine_is_noted_in_the_plan() -> None:
    plan, _, _ = meet(lambda aim: (100.0, aim, "drift"), "60ms")
    assert [note for note in plan.notes if "busy machine (drift)" in note]
    assert meet(lambda aim: (100.0, aim), "60ms")[0].notes == ()


def test_aim_is_corrected_by_the_measurement() -> None:
    # Cuts take 1.5 times what is predicted: an aim of 40 meets 60 ms; 0.98 of that is tried.
    plan, _, aims = meet(lambda aim: (100.0, 1.5 * aim), "60ms")
    assert aims == pytest.approx([60.0, 60 * 0.98 / 1.5])
    assert plan.achieved["pruned"]["latency_ms"] == pytest.approx(58.8)


def test_share_refers_to_the_measured_base() -> None:
    # The machine is twice as fast as when the times were fitted: half of the base is 25 ms, not 50.
    plan, _, aims = meet(lambda aim: (50.0, aim / 2), "50%")
    assert aims == [50.0] and plan.achieved["pruned"]["latency_ms"] == 25.0


def test_cut_far_below_budget_is_retried_larger() -> None:
    plan, _, aims = meet(lambda aim: (100.0, 0.5 * aim), "40ms")
    assert aims == pytest.approx([40.0, 40 * 0.98 / 0.5])
    assert plan.achieved["pruned"]["latency_ms"] == pytest.approx(39.2)


def test_aim_below_smallest_cut_is_raised() -> None:
    # Large cuts take 1.9 times what is predicted, so that an aim of 20.6 ms is tried; none below 24 ms can be made.
    # Half-way to the last cut is tried instead, twice; 25.5 ms takes 38.2.
    plan, _, aims = meet(lambda aim: (100.0, 1.9 * aim if aim > 30 else 1.5 * aim), "40ms", smallest=24.0)
    low = 0.98 * 40 / 1.9
    middle = (40 + low) / 2
    assert aims == pytest.approx([40.0, low, middle, low, (middle + low) / 2])
    assert plan.achieved["pruned"]["latency_ms"] == pytest.approx(1.5 * (middle + low) / 2, abs=1e-3)


def test_unreachable_budget_is_refused_at_once() -> None:
    with pytest.raises(BudgetError, match="too small"):
        meet(lambda aim: (100.0, aim), "10ms", smallest=24.0)


def test_budget_unmet_when_measured_is_refused() -> None:
    with pytest.raises(BudgetError, match=r"target_latency 60ms .* 6 cuts .* 150 %"):
        meet(lambda aim: (100.0, 90.0), "60ms")


@pytest.mark.parametrize("block", [1, 16])
def test_blocks_of_kernels_are_measured(block: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = make_base("resnet", tmp_path)
    seen: list[tuple[int, ...]] = []

    def timed(variants, image_size, **_) -> list[LayerTimes]:
        """Return a time of every convolution and linear layer: the product of its widths in begun blocks."""
        found = []
        for model, layer_macs in variants:
            modules = {name: model.model.get_submodule(name) for name in layer_macs}
            seen.append(tuple(m.out_channels for m in modules.values() if isinstance(m, nn.Conv2d)))
            times = {}
            for name, module in modules.items():
                is_conv = isinstance(module, nn.Conv2d)
                widths = module.weight.shape[:2]
                is_cut = [True, module.in_channels > 3] if is_conv else [False, True]
                times[name] = 1.0
                for width, cut in zip(widths, is_cut, strict=True):
                    times[name] *= -(-width // block) * block if cut else width
            found.append(LayerTimes(times, sum(times.values())))
        return found

    monkeypatch.setattr(latency, "time_in_runtime", timed)
    monkeypatch.setattr(latency_cache, "cache_folder", lambda: tmp_path)
    groups = trace_groups(base)
    fitted = fit_base(base, groups, cost_model(base, groups), LatencySettings(), round_to=8)
    assert fitted.multiple == block
    # The base and three cuts to multiples of 16, then one to multiples of 8.
    dense, *cuts, probe = seen
    assert len(cuts) == 3 and all(width % 16 == 0 or width in dense for cut in cuts for width in cut)
    assert any(width % 16 == 8 for width in probe)
