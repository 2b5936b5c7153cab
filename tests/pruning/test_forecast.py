"""What a pruning will cost, compared with counts of the layers that run."""

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from helpers.marks import one_of_each
from helpers.oracles import randomize
from helpers.tiny_models import make_base
from torch import nn

from isoprune_hf.checkpoint.modeling_isoprune import IsoPruneForImageClassification
from isoprune_hf.pruning.calibration.calibration import Calibration
from isoprune_hf.pruning.forecast import forecast
from isoprune_hf.pruning.graph.find_groups import trace_groups
from isoprune_hf.pruning.repairing.repairs.registry import REPAIRS
from isoprune_hf.pruning.repairing.repairs.task import RepairTask
from isoprune_hf.pruning.scoring.criteria.trial_loss import foretell_passes
from isoprune_hf.pruning.scoring.score_groups import score_groups
from isoprune_hf.recipes import PruneRecipe

Model = IsoPruneForImageClassification


@pytest.fixture
def base(tmp_path: Path) -> Model:
    model = make_base("resnet", tmp_path).eval()
    with torch.no_grad():
        randomize(model)
    return model


def count_operations(run: Callable[[], object]) -> int:
    """Return the multiply-adds of all layers that run in batches of more than four images."""
    found = [0]

    def add(module: nn.Module, args: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        is_run = isinstance(module, nn.Linear | nn.Conv2d) and "forward" not in vars(module)
        if is_run and len(output) > 4:  # others search for layers and waypoints
            found[0] += output.numel() * module.weight[0].numel()

    handle = nn.modules.module.register_module_forward_hook(add)
    try:
        run()
    finally:
        handle.remove()
    return found[0]


@pytest.mark.parametrize("images", one_of_each([40, 80], 40))
@pytest.mark.parametrize("repair", one_of_each(["none", "bn", "bias", "least_squares"], "none", "bn", "bias"))
def test_passes_of_repair_are_those_that_run(repair: str, images: int, base: Model) -> None:
    pixels = torch.randn(images, *base.config.image_size)
    batches = [(part, torch.zeros(len(part))) for part in pixels.split(40)]
    cut = copy.deepcopy(base)  # of the same size, and with an error in every layer
    with torch.no_grad():
        for name, parameter in cut.named_parameters():
            parameter.mul_(0.9 if name.endswith("weight") else 1.1)
        whole = count_operations(lambda: base(pixel_values=pixels))
    task = RepairTask(base, cut, {}, {}, Calibration(batches))
    ran = count_operations(lambda: REPAIRS[repair].repair(task)) / whole
    recipe = PruneRecipe(target_macs="100%", reconstruct=repair)
    expected = forecast(base, recipe, images=images).passes["repair"]
    assert expected == pytest.approx(ran, rel=0.1)


@pytest.mark.parametrize(("images", "size"), [(40, 40), pytest.param(96, 48, marks=pytest.mark.families)])
def test_passes_of_trial_cuts_are_those_that_run(images: int, size: int, base: Model) -> None:
    pixels = torch.randn(images, *base.config.image_size)
    batches = [(part, torch.arange(len(part)) % 7) for part in pixels.split(size)]
    groups = trace_groups(base)
    whole = count_operations(lambda: base(pixel_values=pixels))
    ran, expected = {}, {}
    for name in ("gate_fisher_joint", "trial_loss"):
        ran[name] = count_operations(lambda name=name: score_groups(base, groups, criterion=name, batches=batches))
        recipe = PruneRecipe(target_macs="100%", criterion=name, batch_size=size)
        expected[name] = forecast(base, recipe, images=images).passes["score"]
    passes = (ran["trial_loss"] - ran["gate_fisher_joint"]) / whole
    assert expected["trial_loss"] - expected["gate_fisher_joint"] == pytest.approx(passes, rel=0.05)


def test_products_of_a_fit_are_counted_by_hand(base: Model) -> None:
    base.model = nn.Sequential(nn.Conv2d(3, 8, 3, groups=1), nn.Flatten(), nn.Linear(8, 5))
    base.config.image_size = [3, 3, 3]
    found = forecast(base, PruneRecipe(target_macs="100%"), images=100)
    macs, products = 27 * 8 + 8 * 5, 27 * (27 + 8) + 8 * (8 + 5)
    assert found.products == pytest.approx(1.8 * products / macs)
    assert found.stored_bytes == pytest.approx(2 * 1.8 * 8 * 4 * 100, abs=1)
    assert found.weight_bytes == 4 * (27 * 8 + 8 + 8 * 5 + 5)


def test_stages_follow_the_recipe(base: Model) -> None:
    plain = forecast(base, PruneRecipe(criterion="l1", ratio=0.5), images=0, evaluated=100)
    assert {stage: value for stage, value in plain.passes.items() if stage != "evaluate"} == {
        "rotate": 0,
        "score": 0,
        "repair": 0,
    }
    best = forecast(base, PruneRecipe(target_macs="70%", steps=2), images=200, evaluated=50, ranks=2)
    alone = forecast(base, PruneRecipe(target_macs="70%"), images=200, evaluated=50)
    scoring = 2 * (3 + foretell_passes(base, trace_groups(base), images=200, batch_size=64))
    assert best.passes["rotate"] == 1 and best.passes["score"] == pytest.approx(scoring)
    assert best.passes["repair"] == 2 * alone.passes["repair"]
    assert best.passes["evaluate"] == pytest.approx(50 * 1.7 / 200)
    assert best.seconds("score") == pytest.approx(scoring * best.pass_seconds) and best.pass_seconds > 0
    assert alone.score_bytes > alone.weight_bytes
