"""Repairs are judged by images that they did not see, and the logits are scaled to those of the dense network."""

import copy
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.plain_scores import batches_of
from helpers.tiny_models import make_base, make_images

from isoprune_hf.checkpoint.modeling_isoprune import IsoPruneForImageClassification
from isoprune_hf.models import load_base
from isoprune_hf.pruning.calibration.calibration import Calibration
from isoprune_hf.pruning.cutting.cut import apply_plan, keep_masks
from isoprune_hf.pruning.graph.find_groups import trace_groups
from isoprune_hf.pruning.plan import PruningPlan
from isoprune_hf.pruning.repairing import ridge as ridge_module
from isoprune_hf.pruning.repairing.equations import Equations
from isoprune_hf.pruning.repairing.judging import SCALES, Divergences, Judge, Judgement, judge, split_images
from isoprune_hf.pruning.repairing.logit_scale import scale_logits
from isoprune_hf.pruning.repairing.repairs import least_squares
from isoprune_hf.pruning.repairing.repairs.batchnorm import recalibrate_batchnorm
from isoprune_hf.pruning.repairing.repairs.task import RepairTask
from isoprune_hf.pruning.repairing.trials import Trial

Model = IsoPruneForImageClassification


def logits_of(model: Model, images: torch.Tensor) -> np.ndarray:
    with torch.no_grad():
        return model.eval()(pixel_values=images).logits.double().numpy()


def divergence(wanted: np.ndarray, found: np.ndarray) -> np.ndarray:
    p, q = (np.exp(values) / np.exp(values).sum(1, keepdims=True) for values in (wanted, found))
    return (p * np.log(p / q)).sum(1)


def task_of(family: str, folder: Path, sizes: tuple[int, ...] = (15, 5)) -> RepairTask:
    """Cut every other channel, for images in micro-batches of these sizes."""
    dense = make_base(family, folder).eval()
    groups = trace_groups(dense)
    plan = PruningPlan({g.name: tuple(range(0, g.channels, 2)) for g in groups if not g.num_heads}, {})
    pruned = apply_plan(dense, plan, groups)
    calibration = Calibration(batches_of(dense, list(sizes)))
    return RepairTask(dense, pruned, keep_masks(plan, groups, dense.model), {}, calibration)


def folds_of(task: RepairTask) -> tuple[tuple[Calibration, Calibration], ...]:
    return split_images(task.calibration, task.dense.device)


def judgement_of(model: Model, dense: Model, calibration: Calibration) -> Judgement:
    return judge([Judge(dense, model, calibration).compare(model)])


@pytest.mark.parametrize(
    ("sizes", "expected"),
    [
        ([60, 4], [[*range(48, 60)]]),  # every fifth of 64 images
        ([11, 4, 3, 1], [[6, 7, 8, 9, 10, 13, 14, 17], [0, 1, 2, 3, 4, 5, 11, 12, 15, 16, 18]]),  # both halves of few
    ],
)
def test_images_are_held_out(sizes: list[int], expected: list[list[int]]) -> None:
    count = sum(sizes)
    images, labels = torch.arange(float(count)).view(count, 1, 1, 1), torch.arange(count)
    batches = list(zip(images.split(sizes), labels.split(sizes), strict=True))
    folds = split_images(Calibration(batches), torch.device("cpu"))
    for _ in range(2):  # they are read several times
        for parts, wanted in zip(folds, expected, strict=True):
            fitted, held = ([label for _, part in half.batches for label in part.tolist()] for half in parts)
            assert held == wanted
            assert sorted(fitted + held) == list(range(count))
    assert all(torch.equal(x.flatten(), y.float()) for parts in folds for half in parts for x, y in half.batches)


def test_parts_are_judged_together(tmp_path: Path) -> None:
    task = task_of("resnet", tmp_path)
    parts = [
        Judge(task.dense, task.pruned, Calibration([batch])).compare(task.pruned) for batch in task.calibration.batches
    ]
    images = torch.cat([images for images, _ in task.calibration.batches])
    wanted, found = logits_of(task.dense, images), logits_of(task.pruned, images)
    np.testing.assert_allclose(judge(parts).center, found.mean(0), rtol=1e-4, atol=1e-6)
    at_one = SCALES.index(1)
    plain = [Divergences(part.sums[:, [at_one]].expand(3, len(SCALES)), *part[1:]) for part in parts]
    assert judge(plain).divergence == pytest.approx(divergence(wanted, found).mean(), rel=1e-4)


def test_divergence_and_scale_are_those_of_numpy(tmp_path: Path) -> None:
    task = task_of("resnet", tmp_path)
    found = judgement_of(task.pruned, task.dense, task.calibration)
    images = torch.cat([images for images, _ in task.calibration.batches])
    wanted, cut = logits_of(task.dense, images), logits_of(task.pruned, images)
    center = cut.mean(0)
    np.testing.assert_allclose(found.center, center, rtol=1e-4, atol=1e-6)
    values = [divergence(wanted, center + scale * (cut - center)) for scale in SCALES]
    best = int(np.argmin([value.mean() for value in values]))
    gains = values[SCALES.index(1)] - values[best]
    is_sure = gains.mean() > gains.std(ddof=1) / len(gains) ** 0.5
    assert found.scale == (SCALES[best] if is_sure else 1)
    assert found.divergence == pytest.approx(values[SCALES.index(found.scale)].mean(), rel=1e-4)


def test_scale_within_its_error_is_one(tmp_path: Path) -> None:
    dense = make_base("vit", tmp_path).eval()
    images = make_images(dense, 2)
    wanted = torch.from_numpy(logits_of(dense, images))
    labels = torch.zeros(1, dtype=torch.long)
    compared = Judge(dense, dense, Calibration([(image[None], labels) for image in images]))
    other = copy.deepcopy(dense)
    with torch.no_grad():
        other.model.head.weight.zero_()
    head = other.model.head.register_forward_hook
    center = wanted.mean(0)
    for factors, scale in (((0.5, 0.5), 2), ((0.5, 1.6), 1)):
        answers = iter([center + factor * (row - center) for factor, row in zip(factors, wanted, strict=True)])
        hook = head(lambda module, args, output, answers=answers: next(answers)[None].float())
        assert judge([compared.compare(other)]).scale == scale
        hook.remove()


@pytest.mark.parametrize(("parts", "scale"), [(1, 0.5), (2, 2.0)])
def test_scale_of_few_images_keeps_squares(parts: int, scale: float) -> None:
    kept = [SCALES.index(each) for each in (0.5, 1.0, 2.0)]
    sums = torch.zeros(3, len(SCALES), dtype=torch.float64)
    sums[0] = 20
    sums[0, kept] = torch.tensor([2.0, 10, 5], dtype=torch.float64)  # divergences of ten images
    sums[2, kept] = torch.tensor([50.0, 40, 30], dtype=torch.float64)  # squares
    sums[1, kept] = (sums[0, kept] - 10).square() / 10  # the gain of all images is equal
    found = judge([Divergences(sums, torch.zeros(4, dtype=torch.float64), 10, 10)] * parts)
    assert (found.scale, found.distance) == (scale, 4.0)


@pytest.mark.parametrize(("parts", "scale", "divergence"), [(1, 0.5, 0.2), (2, 1.0, 1.0)])
def test_unrepaired_logits_of_few_keep_scale(parts: int, scale: float, divergence: float) -> None:
    sums = torch.zeros(3, len(SCALES), dtype=torch.float64)
    sums[0] = 20
    sums[0, [SCALES.index(0.5), SCALES.index(1.0)]] = torch.tensor([2.0, 10], dtype=torch.float64)  # of ten images
    sums[1, SCALES.index(0.5)] = 6.4  # the gain of all images is equal
    found = judge([Divergences(sums, torch.zeros(4, dtype=torch.float64), 10, 10)] * parts, is_repaired=False)
    assert (found.scale, found.divergence) == (scale, pytest.approx(divergence))


def test_logits_halfway_to_their_mean_are_scaled(tmp_path: Path) -> None:
    task = task_of("vit", tmp_path)
    halved = copy.deepcopy(task.dense)
    images = torch.cat([images for images, _ in task.calibration.batches])
    assert scale_logits(halved, 0.5, torch.from_numpy(logits_of(task.dense, images).mean(0)))
    found = judgement_of(halved, task.dense, task.calibration)
    assert found.scale == 2
    assert found.divergence == pytest.approx(0, abs=1e-6)
    torch.nn.init.constant_(halved.model.head.bias, float("nan"))
    assert judgement_of(halved, task.dense, task.calibration).divergence == float("inf")


@pytest.mark.parametrize("family", ["vit", "resnet", "hf-vit"])
def test_logits_are_scaled(family: str, tmp_path: Path) -> None:
    model = make_base(family, tmp_path)
    images = make_images(model, 3)
    before = logits_of(model, images)
    center = np.arange(before.shape[1]) / 10
    assert scale_logits(model, 3.0, torch.from_numpy(center))
    np.testing.assert_allclose(logits_of(model, images), 3 * before - 2 * center, rtol=1e-4, atol=1e-5)


def test_mean_of_two_heads_is_not_scaled() -> None:
    name = "timm/deit_tiny_distilled_patch16_224"
    model = load_base(name, False, model_args={"img_size": 32, "embed_dim": 24, "depth": 1, "num_heads": 2}).model
    before = {key: value.clone() for key, value in model.state_dict().items()}
    assert not scale_logits(model, 3.0, torch.zeros(1000))
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize("best", ["none", "bn"])
def test_repair_that_does_worse_is_not_kept(best: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    task = task_of("resnet", tmp_path)
    if best == "bn":
        for name, buffer in task.pruned.named_buffers():
            if name.endswith("running_mean"):
                buffer.add_(100)
    expected = copy.deepcopy(task.pruned)

    def damage(
        dense: Model, pruned: Model, *args: object, trial: Trial | None = None, **kwargs: object
    ) -> tuple[str, ...]:
        for parameter in (*pruned.parameters(), *(trial.network.parameters() if trial else ())):
            torch.nn.init.normal_(parameter)
        return ("a note about layers",)

    def confuse(pruned: Model, calibration: Calibration) -> tuple[str, ...]:
        torch.nn.init.normal_(pruned.model.fc.weight)
        return ()

    monkeypatch.setattr(least_squares, "fit_layers", damage)
    if best == "none":
        monkeypatch.setattr(least_squares, "recalibrate_batchnorm", confuse)
    else:
        recalibrate_batchnorm(expected, task.calibration)
    notes = least_squares.LeastSquaresRepair().repair(task)
    assert len(notes) == 1 and f"prune.reconstruct {best} " in notes[0]
    head = {name for name in expected.state_dict() if "fc." in name}
    assert all(
        torch.equal(task.pruned.state_dict()[name], expected.state_dict()[name])
        for name in expected.state_dict().keys() - head
    )
    images = make_images(task.dense, 4)
    found, plain = (np.diff(logits_of(model, images), axis=0) for model in (task.pruned, expected))
    ratio = found / plain  # differences between images do not depend on the center
    np.testing.assert_allclose(ratio, ratio[0, 0], rtol=1e-3)
    assert any(ratio[0, 0] == pytest.approx(scale, rel=1e-3) for scale in SCALES)


def test_fit_that_fails_on_half_is_dropped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    task = task_of("vit", tmp_path)
    expected = copy.deepcopy(task.pruned)
    fit_layers = least_squares.fit_layers

    def fit(*args: object, trial: Trial, **kwargs: object) -> tuple[str, ...]:
        notes = fit_layers(*args, trial=trial, **kwargs)
        torch.nn.init.normal_(trial.opposite.model.head.weight, std=10)  # that of the second half
        return notes

    monkeypatch.setattr(least_squares, "fit_layers", fit)
    (note,) = least_squares.LeastSquaresRepair().repair(task)
    assert "prune.reconstruct none " in note and "on 20 images" in note
    head = {name for name in expected.state_dict() if "head." in name}
    found = task.pruned.state_dict()
    assert all(torch.equal(value, found[name]) for name, value in expected.state_dict().items() if name not in head)


class FixedJudge:
    """A judge of 10 images with fixed results: a mean of 1 without a repair, else of 0.5; and of squares.

    Repaired logits are nearest at half their scale.
    """

    images = 10

    def __init__(self, nearer: int, cut: Model, squares: float = 5.0):
        self.nearer, self.cut, self.squares = nearer, copy.deepcopy(cut.state_dict()), squares

    def compare(self, pruned: Model) -> Divergences:
        is_cut = all(torch.equal(value, self.cut[name]) for name, value in pruned.state_dict().items())
        sums = torch.full((3, len(SCALES)), 10.0 if is_cut else 5.0, dtype=torch.float64)
        sums[2] = 10.0 if is_cut else self.squares
        if not is_cut:
            sums[0::2, SCALES.index(0.5)] = 1.0
        logits = torch.zeros(pruned.config.num_labels, dtype=torch.float64)
        return Divergences(sums, logits, 10, 10 if is_cut else self.nearer)


@pytest.mark.parametrize(
    ("counts", "squares", "is_kept"), [((9, 1), 5, False), ((9, 2), 10, True), ((10, 10), 10.1, False)]
)
def test_few_images_decide_by_majority_and_squares(
    counts: tuple[int, int], squares: float, is_kept: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    task = task_of("vit", tmp_path)
    expected = copy.deepcopy(task.pruned.state_dict())
    nearer = iter(counts)
    monkeypatch.setattr(least_squares, "Judge", lambda dense, cut, images: FixedJudge(next(nearer), cut, squares))
    notes = least_squares.LeastSquaresRepair().repair(task)
    found = task.pruned.state_dict()
    assert (notes == ()) == is_kept
    assert all(torch.equal(value, found[name]) for name, value in expected.items()) != is_kept


def test_nearer_images_are_counted(tmp_path: Path) -> None:
    task = task_of("vit", tmp_path)
    images = torch.cat([images for images, _ in task.calibration.batches])
    other = copy.deepcopy(task.pruned)
    with torch.no_grad():
        other.model.head.bias.add_(torch.arange(len(other.model.head.bias)))
    wanted, before, after = (logits_of(model, images) for model in (task.dense, task.pruned, other))
    found = Judge(task.dense, task.pruned, task.calibration).compare(other)
    assert found.nearer == (divergence(wanted, after) <= divergence(wanted, before)).sum()
    assert Judge(task.dense, task.pruned, task.calibration).compare(task.pruned).nearer == 20


def test_fit_is_kept_if_it_is_nearest(tmp_path: Path) -> None:
    task = task_of("vit", tmp_path)
    with torch.no_grad():
        for parameter in task.pruned.parameters():
            parameter.mul_(0.8)
    before = judgement_of(task.pruned, task.dense, task.calibration)
    assert least_squares.LeastSquaresRepair().repair(task) == ()
    after = judgement_of(task.pruned, task.dense, task.calibration)
    assert after.divergence < before.divergence
    assert after.scale == pytest.approx(1, abs=0.5)


def test_fit_that_is_judged_sees_no_held_image(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    task = task_of("vit", tmp_path, (60, 4))
    alone = copy.deepcopy(task.pruned)
    fitted, _ = folds_of(task)[0]
    least_squares.fit_layers(task.dense, alone, task.masks, fitted)
    judged: list[dict[str, torch.Tensor]] = []
    monkeypatch.setattr(least_squares, "Judge", lambda *args: Recorder(judged, Judge(*args)))
    assert least_squares.LeastSquaresRepair().repair(task) == ()
    found = judged[-1]
    assert all(torch.equal(value, found[name]) for name, value in alone.state_dict().items())
    assert not all(torch.equal(value, found[name]) for name, value in task.pruned.state_dict().items())


class Recorder:
    """A judge that records the weights that it is shown."""

    def __init__(self, judged: list[dict[str, torch.Tensor]], judge: Judge):
        self.judged, self.judge, self.images = judged, judge, judge.images

    def compare(self, pruned: Model) -> object:
        self.judged.append(copy.deepcopy(pruned.state_dict()))
        return self.judge.compare(pruned)


def test_fits_to_halves_are_those_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    task = task_of("vit", tmp_path)
    folds = folds_of(task)
    alone = []
    for batches in (folds[0][0].batches, folds[1][0].batches, [*folds[0][0].batches, *folds[0][1].batches]):
        alone.append(copy.deepcopy(task.pruned))
        least_squares.fit_layers(task.dense, alone[-1], task.masks, Calibration(batches))
    judged: list[dict[str, torch.Tensor]] = []
    monkeypatch.setattr(least_squares, "Judge", lambda *args: Recorder(judged, Judge(*args)))
    monkeypatch.setattr(least_squares, "scale_logits", lambda *args: True)
    assert least_squares.LeastSquaresRepair().repair(task) == ()
    for network, found in zip(alone, [*judged[-2:], task.pruned.state_dict()], strict=True):
        assert all(torch.equal(value, found[name]) for name, value in network.state_dict().items())


def test_kept_fit_is_that_to_all_images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    task = task_of("vit", tmp_path, (60, 4))
    alone = copy.deepcopy(task.pruned)
    parts = [[*part.batches] for part in folds_of(task)[0]]
    ridge = 0.3  # which is otherwise chosen without the held-out images
    monkeypatch.setattr(ridge_module, "choose_ridge", lambda *args, **kwargs: ridge)
    least_squares.fit_layers(task.dense, alone, task.masks, Calibration([*parts[0], *parts[1]]))
    monkeypatch.setattr(least_squares, "scale_logits", lambda *args: True)
    assert least_squares.LeastSquaresRepair().repair(task) == ()
    found = task.pruned.state_dict()
    assert all(torch.equal(value, found[name]) for name, value in alone.state_dict().items())


def test_ridge_is_chosen_once_without_held_images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    task = task_of("vit", tmp_path, (60, 4))
    rows: list[float] = []

    def choose(first: Equations, second: Equations, **kwargs: object) -> float:
        rows.append(float(first.totals[-1] + second.totals[-1]))
        return 0.3

    monkeypatch.setattr(ridge_module, "choose_ridge", choose)
    fitted, held = folds_of(task)[0]
    trial = Trial(copy.deepcopy(task.pruned), held.batches)
    least_squares.fit_layers(task.dense, task.pruned, task.masks, fitted, trial=trial)
    names = [module for module in task.pruned.modules() if isinstance(module, torch.nn.Linear)]
    assert len(rows) >= len(names)
    assert all(count % 52 == 0 for count in rows)  # 48 + 4 of 60 + 4 images, each with the same number of rows
