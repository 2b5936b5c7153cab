"""Losses that trial cuts correct, worked out by hand, and trial cuts, compared with networks of changed weights."""

from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from helpers.plain_scores import Batches, batches_of
from helpers.ranks import call_on_ranks
from helpers.tiny_models import make_base

from isoprune_hf.checkpoint.modeling_isoprune import IsoPruneForImageClassification
from isoprune_hf.pruning.calibration.calibration import Calibration
from isoprune_hf.pruning.graph.find_groups import trace_groups
from isoprune_hf.pruning.groups import CoupledGroup
from isoprune_hf.pruning.scoring import trial_cuts
from isoprune_hf.pruning.scoring.criteria.trial_loss import correct_losses, ratios_of
from isoprune_hf.pruning.scoring.gate_points import find_gate_points
from isoprune_hf.pruning.scoring.score_groups import score_groups
from isoprune_hf.pruning.scoring.trial_cuts import TrialCut, measure_trial_cuts

HIDDEN = "blocks.0.mlp.fc2.weight"


def group_read_by(model: IsoPruneForImageClassification, weight: str) -> CoupledGroup:
    return next(g for g in trace_groups(model) if any((m.parameter, m.dim) == (weight, 1) for m in g.members))


def measure(
    model: IsoPruneForImageClassification, group: CoupledGroup, removed: list[int], calibration: Calibration
) -> float | None:
    points, _ = find_gate_points(model, [group])
    cuts = {group.name: [TrialCut(group.name, np.array(removed))]}
    found = measure_trial_cuts(model, points, cuts, calibration).get(group.name)
    return None if found is None else found[0][1]


@pytest.mark.parametrize(
    ("losses", "measured", "heads", "expected"),
    [
        ([4.0, 1.0, 3.0, 2.0], [([1, 3], 6.0)], 1, [8, 2, 6, 4]),
        ([1.0, 2.0, 3.0, 4.0], [([0, 2], 2.0)], 2, [0.5, 1, 1.5, 2]),
        # Ratios of 1/4, 1 and 4 after one, two and three channels: losses of 1/4, 2, 12 and 16 in all.
        ([1.0, 1.0, 1.0, 1.0], [([0], 0.25), ([0, 1, 2], 12.0)], 1, [0.25, 1.75, 7, 7]),
        ([1.0, 2.0], [], 1, [1, 2]),
        ([0.0, 2.0], [([0], 0.5)], 1, [0, 2]),
        ([1.0, 2.0], [([0], float("nan"))], 1, [1, 2]),
    ],
)
def test_corrected_losses_by_hand(
    losses: list[float], measured: list[tuple[list[int], float]], heads: int, expected: list[float]
) -> None:
    cuts = [(np.array(removed), loss) for removed, loss in measured]
    ratios = ratios_of(np.array(losses), cuts)
    found = correct_losses(np.array(losses), np.zeros(3) if ratios is None else ratios, heads)
    np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_order_of_removal_stays_where_losses_tie() -> None:
    losses = np.arange(1.0, 9.0)[::-1]
    found = correct_losses(losses, ratios_of(losses, [(np.arange(6, 8), 9.0), (np.arange(2, 8), 10.0)]))
    assert np.argsort(found.astype(np.float32), kind="stable").tolist() == list(range(8))[::-1]


def divergence_of_refitted(model: IsoPruneForImageClassification, batches: Batches, removed: list[int]) -> float:
    """Compute the divergence after a ridge regression of the removed inputs has been put into the weights of fc2."""
    layer = model.model.get_submodule(HIDDEN.removesuffix(".weight"))
    read: list[torch.Tensor] = []
    handle = layer.register_forward_pre_hook(lambda _, args: read.append(args[0].flatten(0, 1).double()))
    for images, _ in batches:
        model(pixel_values=images[:-1])
    handle.remove()
    rows = torch.cat(read).numpy()
    kept = np.setdiff1d(np.arange(rows.shape[1]), removed)
    mean = rows.mean(0)
    centred = rows - mean
    energy = (rows[:, kept] ** 2).mean(0)
    damping = (1e-3 + len(kept) / len(rows)) * rows[:, kept].var(0) + 1e-6 * energy
    products = centred[:, kept].T @ centred[:, kept] + len(rows) * np.diag(damping)
    weights = np.linalg.solve(products, centred[:, kept].T @ centred[:, removed])
    before = [model(pixel_values=images[-1:]).logits for images, _ in batches]
    state = {name: value.clone() for name, value in layer.state_dict().items()}
    lost = state["weight"][:, removed].double()
    layer.weight[:, kept] += (lost @ torch.from_numpy(weights).T).float()
    layer.bias += (lost @ torch.from_numpy(mean[removed] - mean[kept] @ weights)).float()
    layer.weight[:, removed] = 0
    after = [model(pixel_values=images[-1:]).logits for images, _ in batches]
    layer.load_state_dict(state)
    pairs = (torch.cat(parts).double().log_softmax(1) for parts in (before, after))
    wanted, found = pairs
    return float((wanted.exp() * (wanted - found)).sum(1).mean())


@torch.no_grad()
def test_trial_cut_is_a_refitted_layer(tmp_path: Path) -> None:
    model = make_base("vit", tmp_path).eval()
    batches = batches_of(model, [6, 5])
    removed = [0, 3, 4, 9, 11, 20]
    found = measure(model, group_read_by(model, HIDDEN), removed, Calibration(batches))
    assert found == pytest.approx(divergence_of_refitted(model, batches, removed), rel=1e-3)
    assert found > 1e-7


def test_uncalled_layers_and_single_images_are_not_measured(tmp_path: Path) -> None:
    model = make_base("vit", tmp_path)
    group = group_read_by(model, HIDDEN)
    assert measure(model, group, [0], Calibration(batches_of(model, [1, 1]))) is None
    points = [point._replace(layer="") for point in find_gate_points(model, [group])[0]]
    cuts = {group.name: [TrialCut(group.name, np.array([0]))]}
    assert measure_trial_cuts(model, points, cuts, Calibration(batches_of(model, [4]))) == {}


@pytest.mark.parametrize("family", ["vit", "resnet", "mobilenet_v2"])
def test_cuts_are_measured_alike_in_portions(family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_base(family, tmp_path)
    groups = trace_groups(model)
    points, _ = find_gate_points(model, groups)
    cuts = {group.name: [TrialCut(group.name, np.arange(0, group.channels, 3))] for group in groups}
    calibration = Calibration(batches_of(model, [4, 4]))
    whole = measure_trial_cuts(model, points, cuts, calibration)
    widths = {point.layer: trial_cuts._input_width(model, point) for point in points}
    sizes = [sum((widths[p.layer] + 1) ** 2 for p in points if p.group == group.name) for group in groups]
    monkeypatch.setattr(trial_cuts, "_MAX_BYTES", 8 * max(sizes))
    portions = measure_trial_cuts(model, points, cuts, calibration)
    assert whole.keys() == portions.keys() == cuts.keys()
    for name, [(_, divergence)] in whole.items():
        assert portions[name][0][1] == pytest.approx(divergence, rel=1e-6) and divergence > 0


def test_scores_are_joint_without_images_to_judge(tmp_path: Path) -> None:
    model = make_base("vit", tmp_path)
    groups = trace_groups(model)
    batches = batches_of(model, [1, 1])
    plain, corrected = (
        score_groups(model, groups, criterion=name, batches=batches) for name in ("gate_fisher_joint", "trial_loss")
    )
    assert all(torch.equal(score, corrected.scores[name]) for name, score in plain.scores.items())


def test_ranks_agree_on_trial_losses(tmp_path: Path) -> None:
    model = make_base("vit", tmp_path)
    groups = trace_groups(model)
    batches = batches_of(model, [3] * 4)
    alone = score_groups(model, groups, criterion="trial_loss", batches=iter(batches))

    def work(accelerator: Accelerator) -> None:
        own = batches[accelerator.process_index :: accelerator.num_processes]
        shared = score_groups(model, groups, criterion="trial_loss", batches=own, accelerator=accelerator)
        for name, score in alone.scores.items():
            torch.testing.assert_close(shared.scores[name], score, rtol=1e-4, atol=1e-9)

    call_on_ranks(work, tmp_path / "ranks.log")
