"""Trial cuts take a bounded number of passes, whatever depth and number of images: counted in layers that run."""

from collections.abc import Callable, Sequence
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.marks import one_of_each
from helpers.plain_scores import batches_of
from helpers.tiny_models import make_base
from helpers.traced_models import make_timm
from torch import nn

from isoprune_hf.checkpoint.modeling_isoprune import IsoPruneForImageClassification
from isoprune_hf.pruning.calibration.calibration import Calibration
from isoprune_hf.pruning.graph.find_groups import trace_groups
from isoprune_hf.pruning.groups import CoupledGroup
from isoprune_hf.pruning.partial_passes import storage
from isoprune_hf.pruning.partial_passes.waypoints import Waypoints
from isoprune_hf.pruning.scoring import trial_choice, trial_cuts
from isoprune_hf.pruning.scoring.criteria.trial_loss import spread_ratios
from isoprune_hf.pruning.scoring.gate_points import find_gate_points
from isoprune_hf.pruning.scoring.trial_choice import choose_trials
from isoprune_hf.pruning.scoring.trial_cuts import TrialCut, measure_trial_cuts

MOST_PASSES = 3.5  # over all images
SINGLE_PASSES = 8  # of one image, which find the layers and waypoints
BEFORE = Waypoints.before
NETS = {
    "vit": ("vit_tiny_patch16_224", {"img_size": 32, "embed_dim": 12, "num_heads": 2, "depth": 12}),
    "resnet": ("resnet18", {"channels": (8, 8, 8, 8), "layers": (4, 4, 4, 4)}),
}


def build(net: str) -> IsoPruneForImageClassification:
    torch.manual_seed(0)
    name, args = NETS[net]
    return make_timm(name, 32, **args)


def count_passes(model: IsoPruneForImageClassification, run: Callable[[], object]) -> float:
    """Return the multiply-adds of the layers that run, in whole passes of one image."""
    found = [0]

    def add(module: nn.Module, args: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        if isinstance(module, nn.Linear | nn.Conv2d) and "forward" not in vars(module):  # replaced ones do not run
            found[0] += output.numel() * module.weight[0].numel()

    with nn.modules.module.register_module_forward_hook(add), torch.no_grad():
        model(pixel_values=torch.zeros(1, *model.config.image_size))
        whole, found[0] = found[0], 0
        run()
    return found[0] / whole


def possible_cuts(groups: Sequence[CoupledGroup]) -> dict[str, list[TrialCut]]:
    counts = {group.name: range(1, min(group.channels, 4)) for group in groups}
    return {name: [TrialCut(name, np.arange(count)) for count in own] for name, own in counts.items()}


@pytest.mark.parametrize("is_split", [False, True])
@pytest.mark.parametrize("net", NETS)
@pytest.mark.parametrize(
    "sizes", [[16], *(pytest.param(sizes, marks=pytest.mark.families) for sizes in ([2, 2], [64, 64]))]
)
def test_passes_of_trial_cuts_are_bounded(
    net: str, sizes: list[int], is_split: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = build(net)
    groups = trace_groups(model)
    points, _ = find_gate_points(model, groups)
    calibration = Calibration(batches_of(model, sizes))
    if is_split:
        monkeypatch.setattr(trial_cuts, "_MAX_BYTES", 2**16)
    free = 2**40 if is_split else 0
    monkeypatch.setattr(storage, "free_memory", lambda device: (free, 2**40))
    monkeypatch.setattr(storage, "_free_disk", lambda: (0, 2**40))
    passes = count_passes(model, lambda: measure_trial_cuts(model, points, possible_cuts(groups), calibration))
    # The moments of a residual stream are one more pass if those of other groups do not fit beside them.
    assert 0 < passes <= (MOST_PASSES + is_split) * sum(sizes) + SINGLE_PASSES


@pytest.mark.parametrize("family", one_of_each(["vit", "resnet", "convnext", "mobilenet_v2"], "vit"))
def test_trials_start_anywhere_alike(family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_base(family, tmp_path)
    groups = trace_groups(model)
    points, _ = find_gate_points(model, groups)
    cuts, calibration = possible_cuts(groups), Calibration(batches_of(model, [8, 8]))
    monkeypatch.setattr(trial_choice, "PASSES", 1000)
    found = []
    for first in (0, None):  # no waypoint, and all of them
        monkeypatch.setattr(Waypoints, "before", lambda *args, first=first: islice(BEFORE(*args), first))
        found.append(measure_trial_cuts(model, points, cuts, calibration))
    means = [[mean for name in cuts for _, mean in own[name]] for own in found]
    assert means[0] == pytest.approx(means[1]) and len(means[0]) > len(groups)


@pytest.mark.parametrize(
    ("images", "held", "judges", "cuts"),
    [
        (1000, 100, 24, {"a": [1, 2, 3], "b": [4, 5, 6], "c": [7]}),  # 3.75 passes for each judge
        (20, 20, 10, {"a": [1, 2, 3], "b": [4, 5, 6], "c": [7]}),
        (7, 14, 5, {"a": [1, 3], "b": [4, 6], "c": [7]}),  # 2.75
        (4, 8, 4, {"a": [2], "b": [5], "c": [7]}),  # 1.75
        (4, 2, 2, {"a": [1, 2, 3], "b": [4, 5, 6], "c": [7]}),
        (2, 8, 2, {"a": [2], "b": [5], "c": [7]}),
        (1, 8, 1, {"a": [2], "b": [5], "c": [7]}),
        (4, 0, 0, {"a": [], "b": [], "c": []}),
    ],
)
def test_chosen_trials_by_hand(images: int, held: int, judges: int, cuts: dict[str, list[int]]) -> None:
    candidates = {"a": [1, 2, 3], "b": [4, 5, 6], "c": [7]}
    found = choose_trials(candidates, {"a": 0.5, "b": 0.5, "c": 0.75}, images=images, held=held)
    assert (found.cuts, found.judges) == (cuts, judges)
    assert found.passes <= 2 * images


def test_groups_are_left_out_evenly() -> None:
    candidates = {name: [name] for name in "abcdefgh"}
    found = choose_trials(candidates, dict.fromkeys(candidates, 1.0), images=2, held=3)
    assert [name for name, cuts in found.cuts.items() if cuts] == ["b", "d", "f", "h"]
    assert (found.judges, found.passes) == (1, 4)


def test_ratios_of_neighbours_by_hand() -> None:
    groups = [CoupledGroup(name, name[0], 4, ()) for name in ("a0", "b0", "a1", "a2", "c0")]
    known = {"a0": np.array([1.0, 2, 3]), "a2": np.array([4.0, 2, 6]), "b0": np.array([1.0, 5, 0]), "a1": None}
    found = spread_ratios(groups, known)
    # a1 is two groups after a0 and one before a2.
    expected = [[1, 2, 3], [1, 5, 0], [3, 2, 5], [4, 2, 6], [2, 3, 3]]
    np.testing.assert_allclose(found, expected)
    assert not np.any(spread_ratios(groups, {}))
