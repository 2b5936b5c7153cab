"""Repairs without training, compared with solutions computed by hand in numpy."""

import copy
import functools
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from helpers.marks import one_of_each
from helpers.plain_scores import Batches, batches_of
from helpers.ranks import call_on_ranks
from helpers.tiny_models import make_base, make_images
from safetensors.torch import load_file, save_file
from torch import nn

from isoprune_hf.checkpoint.modeling_isoprune import IsoPruneForImageClassification
from isoprune_hf.errors import RecipeError
from isoprune_hf.pruning.calibration.calibration import Calibration
from isoprune_hf.pruning.cutting.cut import apply_plan, keep_masks
from isoprune_hf.pruning.graph.find_groups import trace_groups
from isoprune_hf.pruning.plan import PruningPlan
from isoprune_hf.pruning.prune import prune_model
from isoprune_hf.pruning.repairing.fit_layers import fit_layers
from isoprune_hf.pruning.repairing.repairs.batchnorm import recalibrate_batchnorm
from isoprune_hf.pruning.repairing.ridge import RIDGES
from isoprune_hf.recipes import PruneRecipe

Model = IsoPruneForImageClassification
Masks = dict[tuple[str, int], np.ndarray]


def cut(model: Model, **kept: list[int] | None) -> tuple[Model, Masks]:
    """Remove every other channel of all groups without heads, or only of the group `only`."""
    groups, only = trace_groups(model), kept.get("only")
    plan = PruningPlan(
        {
            g.name: tuple(range(0, g.channels, 2))
            for g in groups
            if not g.num_heads and (only is None or g.name == only)
        },
        {},
    )
    return apply_plan(model, plan, groups), keep_masks(plan, groups, model.model)


def run_layer(model: Model, name: str, batches: Batches) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the inputs and outputs of a layer for all images."""
    found = []
    hook = model.model.get_submodule(name).register_forward_hook(
        lambda module, args, output: found.append((args[0].double(), output.double()))
    )
    with torch.no_grad():
        for images, _ in batches:
            model.eval()(images)
    hook.remove()
    inputs, outputs = zip(*found, strict=True)
    return torch.cat(inputs), torch.cat(outputs)


def rows_of(layer: nn.Module, x: torch.Tensor, group: int) -> np.ndarray:
    """Return the features of one group of outputs at each position: (N, features), with a 1 at the end."""
    if isinstance(layer, nn.Linear):
        rows = x.reshape(-1, x.shape[-1]).numpy()
    else:
        (high, wide), (down, right) = layer.kernel_size, layer.stride
        width = layer.in_channels // layer.groups
        x = x[:, group * width : (group + 1) * width].numpy()
        pad = layer.padding
        x = np.pad(x, ((0, 0), (0, 0), (pad[0], pad[0]), (pad[1], pad[1])))
        rows = [
            x[:, :, top : top + high, left : left + wide].reshape(len(x), -1)
            for top in range(0, x.shape[2] - high + 1, down)
            for left in range(0, x.shape[3] - wide + 1, right)
        ]
        rows = np.stack(rows, axis=1).reshape(-1, width * high * wide)
    return np.concatenate([rows, np.ones((len(rows), 1))], axis=1)


def fit(rows: np.ndarray, missing: np.ndarray, ridge: float) -> np.ndarray:
    """Return the change (features, outputs) that least squares with damped slopes yields, the intercept last."""
    x, y = rows[:, :-1] - rows[:, :-1].mean(0), missing - missing.mean(0)
    slopes = 0 * x.T @ y
    if np.isfinite(ridge):
        damping = ridge * (x**2).sum(0) + 1e-6 * (rows[:, :-1] ** 2).sum(0) + 1e-8 * len(rows)
        slopes = np.linalg.inv(x.T @ x + np.diag(damping)) @ x.T @ y
    return np.concatenate([slopes, missing.mean(0, keepdims=True) - rows[:, :-1].mean(0, keepdims=True) @ slopes])


def cross_validated(
    groups: list[tuple[np.ndarray, np.ndarray]], half: np.ndarray, weights: list[np.ndarray]
) -> tuple[float, list[np.ndarray]]:
    """Return the ridge with the least error on the half of the images that was not fitted, and the fit to all.

    The fit has a larger ridge if the weights would become more than four times larger.
    """

    def error_of(ridge: float) -> float:
        total = 0.0
        for rows, missing in groups:
            for other in (0, 1):
                change = fit(rows[half != other], missing[half != other], ridge)
                total += np.square(missing[half == other] - rows[half == other] @ change).sum()
        return total

    best = min(RIDGES, key=error_of)
    assert error_of(best) < sum(np.square(missing).sum() for _, missing in groups)
    for ridge in RIDGES[RIDGES.index(best) :]:
        changes = [fit(rows, missing, ridge) for rows, missing in groups]
        grown = np.concatenate([old.T + change[:-1] for old, change in zip(weights, changes, strict=True)])
        if np.linalg.norm(grown) <= 4 * np.linalg.norm(np.concatenate(weights)):
            break
    return best, changes


def with_variance_of(rows: np.ndarray, weights: np.ndarray, change: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """Return the change that also gives each output the variance of the wanted one, by a factor of 0.5 to 2."""
    fitted = weights.T + change[:-1]
    outputs = rows[:, :-1] @ fitted
    scale = np.ones(len(weights))
    varies = np.all([values.var(0) > 1e-4 * (values**2).mean(0) for values in (outputs, wanted)], axis=0)
    scale[varies] = np.clip(wanted.std(0)[varies] / outputs.std(0)[varies], 0.5, 2)
    return change + np.concatenate([(scale - 1) * fitted, [(1 - scale) * outputs.mean(0)]])


LAYERS = {  # family -> layer that reads cut channels, the group that alone is cut (all where None)
    "linear": ("vit", "blocks.0.mlp.fc2", "blocks.0.mlp.fc1"),
    "linear inside": ("vit", "blocks.1.mlp.fc1", None),
    "convolution": ("resnet", "layer2.0.conv2", None),
    "convolution with a bias": ("convnext", "stages.1.downsample.1", None),
    "grouped": ("resnext", "layer1.0.conv2", None),
    "depthwise": ("mobilenet_v2", "features.3.conv.1.0", None),
}


@pytest.mark.parametrize("case", one_of_each(LAYERS, "linear", "depthwise"))
def test_fitted_layer_is_the_cross_validated_ridge(case: str, tmp_path: Path) -> None:
    family, name, only = LAYERS[case]
    dense = make_base(family, tmp_path).double().eval()
    batches = [(images.double(), labels) for images, labels in batches_of(dense, [4, 3])]
    pruned, masks = cut(dense, only=only)
    before = copy.deepcopy(pruned)
    assert fit_layers(dense, pruned, masks, Calibration(batches)) == ()
    layer, old = pruned.model.get_submodule(name), before.model.get_submodule(name)
    x, _ = run_layer(pruned, name, batches)  # the layers before it have been fitted and do not change
    _, target = run_layer(dense, name, batches)
    dim = 1 if isinstance(layer, nn.Conv2d) else -1
    mask = masks.get((f"{name}.weight", 0))
    target = (target if mask is None else target.index_select(dim, torch.from_numpy(np.flatnonzero(mask)))).movedim(
        dim, -1
    )
    groups = getattr(layer, "groups", 1)
    size = len(layer.weight) // groups
    parts, weights, biases = [], [], []
    for group in range(groups):
        rows, places = rows_of(layer, x, group), slice(group * size, (group + 1) * size)
        weights.append(old.weight[places].detach().reshape(size, -1).numpy())
        biases.append(np.zeros(size) if old.bias is None else old.bias[places].detach().numpy())
        wanted = target[..., places].reshape(-1, size).numpy()
        parts.append((rows, wanted - rows[:, :-1] @ weights[-1].T - biases[-1]))
    images = np.array([0, 0, 1, 1, 0, 1, 1])  # the halves of the two batches
    ridge, changes = cross_validated(parts, np.repeat(images, len(parts[0][0]) // len(images)), weights)
    for group, change in enumerate(changes):
        places = slice(group * size, (group + 1) * size)
        if case != "linear":  # its outputs are added to others
            wanted = target[..., places].reshape(-1, size).numpy()
            change = with_variance_of(parts[group][0], weights[group], change, wanted)
        np.testing.assert_allclose(
            layer.weight[places].detach().reshape(size, -1).numpy(),
            weights[group] + change[:-1].T,
            rtol=1e-5,
            atol=1e-8,
        )
        if layer.bias is not None:
            np.testing.assert_allclose(
                layer.bias[places].detach().numpy(), biases[group] + change[-1], rtol=1e-5, atol=1e-8
            )
        else:  # the shift is subtracted from the mean of the BatchNorm after it
            norm = name.replace("conv2", "bn2") if "conv2" in name else name.replace(".1.0", ".1.1")
            moved = (old_mean := before.model.get_submodule(norm).running_mean) - pruned.model.get_submodule(
                norm
            ).running_mean
            assert len(old_mean) == len(layer.weight)
            np.testing.assert_allclose(moved[places].numpy(), change[-1], rtol=1e-4, atol=1e-7)
    assert 0.003 < ridge < 30
    assert max(np.abs(change[:-1]).max() for change in changes) > 1e-3


def assert_equal_states(found: Model, expected: Model) -> None:
    tensors = found.state_dict()
    assert all(torch.equal(tensors[name], value) for name, value in expected.state_dict().items())


@pytest.mark.parametrize("family", one_of_each(["vit", "resnet", "mobilenet_v2", "hf-swin"], "vit", "resnet"))
def test_fit_without_a_cut_changes_nothing(family: str, tmp_path: Path) -> None:
    dense = make_base(family, tmp_path)
    batches = batches_of(dense, [2])
    for is_bias_only in (False, True):
        same = copy.deepcopy(dense)
        assert fit_layers(dense, same, {}, Calibration(batches), is_bias_only=is_bias_only) == ()
        assert_equal_states(same, dense)


@pytest.mark.parametrize("step", ["bn", "bias", "least_squares"])
def test_recipe_that_cuts_nothing_repairs_nothing(step: str, tmp_path: Path) -> None:
    model = make_base("resnet", tmp_path)
    result = prune_model(model, PruneRecipe(criterion="l1", ratio=0.0, reconstruct=step), batches_of(model, [2]))
    assert_equal_states(result.model, model)


def error(first: Model, second: Model, images: torch.Tensor) -> float:
    with torch.no_grad():
        one, two = first(images).logits, second(images).logits
    return float((one - two).norm() / two.norm())


@pytest.mark.parametrize("family", one_of_each(["vit", "resnet"], "vit"))
def test_removed_copies_of_channels_are_compensated(family: str, tmp_path: Path, monkeypatch) -> None:
    # Odd channels are copies of the even ones before them: without them everything can be computed as before.
    model = make_base(family, tmp_path).eval()
    writers = {"vit": "blocks.1.mlp.fc1", "resnet": "layer4.0.conv1"}
    names = [f"{writers[family]}.weight", f"{writers[family]}.bias"]
    names += [f"layer4.0.bn1.{kind}" for kind in ("weight", "bias", "running_mean", "running_var")]
    with torch.no_grad():
        for name, tensor in model.model.state_dict().items():
            if name in names:
                tensor[1::2] = tensor[::2]
    group = next(g for g in trace_groups(model) if any(m.parameter == names[0] and m.dim == 0 for m in g.members))
    batches, fresh = batches_of(model, [24, 24]), make_images(model, 4, seed=9)
    bare, masks = cut(model, only=group.name)
    fitted = copy.deepcopy(bare)
    fit_layers(model, fitted, masks, Calibration(batches))
    assert error(bare, model, fresh) > 0.01
    assert error(fitted, model, fresh) < 0.3 * error(bare, model, fresh)  # the ridge keeps it from being exact
    monkeypatch.setattr("isoprune_hf.pruning.repairing.ridge.choose_ridge", lambda *args, **kwargs: 1e-6)
    exact = copy.deepcopy(bare)
    fit_layers(model, exact, masks, Calibration(batches))
    assert error(exact, model, fresh) < 1e-3


@pytest.mark.parametrize(("family", "name"), [("vit", "blocks.1.mlp.fc2"), ("resnet", "layer3.0.conv2")])
def test_bias_repair_restores_the_mean_outputs(family: str, name: str, tmp_path: Path) -> None:
    dense = make_base(family, tmp_path).eval()
    batches = batches_of(dense, [8, 4])
    bare, masks = cut(dense)
    fitted = copy.deepcopy(bare)
    fit_layers(dense, fitted, masks, Calibration(batches), is_bias_only=True)
    # For a convolution without bias: the input of the BatchNorm after it, minus its running mean.
    norm = {"layer3.0.conv2": "layer3.0.bn2"}.get(name)
    kept = np.flatnonzero(masks[f"{name}.weight", 0])

    def means(model: Model) -> torch.Tensor:
        _, output = run_layer(model, name, batches)
        mean = output.movedim(1, -1).flatten(0, -2).mean(0) if norm else output.flatten(0, -2).mean(0)
        return mean - model.model.get_submodule(norm).running_mean.double() if norm else mean

    wanted = means(dense)[kept]
    left, before = (means(fitted) - wanted).norm(), (means(bare) - wanted).norm()
    assert left < 0.05 * before and before > 1e-2
    assert torch.equal(fitted.model.get_submodule(name).weight, bare.model.get_submodule(name).weight)


def test_bn_statistics_are_those_of_the_inputs(tmp_path: Path) -> None:
    model = make_base("resnet", tmp_path)
    pruned, _ = cut(model)
    ((images, labels),) = batches_of(pruned, [6])
    # How torch computes them for one batch: as an average over all batches so far.
    by_torch = copy.deepcopy(pruned)
    for module in by_torch.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.reset_running_stats()
            module.momentum = None
    with torch.no_grad():
        by_torch.train()(images)
    assert recalibrate_batchnorm(pruned, Calibration([(images, labels)])) == ()
    counted = 0
    for name, buffer in pruned.model.named_buffers():
        if name.endswith(("running_mean", "running_var")):
            torch.testing.assert_close(buffer, by_torch.model.get_buffer(name), rtol=1e-4, atol=1e-5)
            counted += 1
    assert counted == 2 * 17
    # Of several batches of unequal size, the first BatchNorm has the statistics of all their pixels.
    again, _ = cut(model)
    batches = list(zip(images.split([4, 2]), labels.split([4, 2]), strict=True))
    recalibrate_batchnorm(again, Calibration(batches))
    with torch.no_grad():
        x = again.model.conv1(images).movedim(1, -1).flatten(0, -2).double().numpy()
    np.testing.assert_allclose(again.model.bn1.running_mean, x.mean(0), rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(again.model.bn1.running_var, x.var(0, ddof=1), rtol=1e-4)
    assert again.training is model.training
    assert all(not m._forward_pre_hooks for m in again.modules())


def test_bn_repair_notes_a_model_without_batchnorm(tmp_path: Path) -> None:
    model = make_base("vit", tmp_path)
    assert recalibrate_batchnorm(model, Calibration([])) == (
        "prune.reconstruct bn changes nothing: the model has no BatchNorm",
    )
    with pytest.raises(RecipeError, match=r"no image: prune\.reconstruct"):
        recalibrate_batchnorm(make_base("resnet", tmp_path), Calibration([]))


@pytest.mark.parametrize(
    "family",
    one_of_each(["vit", "mobilenet_v2", "hf-vit"], "mobilenet_v2")
    + one_of_each(["swin", "convnext", "resnext", "hf-resnet"], mark="faults"),
)
def test_least_squares_reduces_error_on_calibration_images(family: str, tmp_path: Path) -> None:
    model = make_base(family, tmp_path).eval()
    batches = batches_of(model, [12])
    recipe = {"criterion": "l1", "ratio": 0.25, "round_to": 1, "rotate": False}
    bare, fitted = (
        prune_model(model, PruneRecipe(**recipe, reconstruct=step), batches) for step in ("none", "least_squares")
    )
    assert fitted.plan.kept == bare.plan.kept
    images = batches[0][0]
    assert error(fitted.model, model, images) < 0.5 * error(bare.model, model, images)


@pytest.mark.parametrize("step", ["bn", "bias", "least_squares"])
def test_repair_needs_images_that_can_be_iterated_again(step: str, tmp_path: Path) -> None:
    model = make_base("resnet", tmp_path)
    recipe = PruneRecipe(criterion="l1", ratio=0.5, round_to=1, rotate=False, reconstruct=step)
    with pytest.raises(RecipeError, match=r"prune\.reconstruct needs data"):
        prune_model(model, recipe)
    images: Iterator = iter(batches_of(model, [2]))
    with pytest.raises(RecipeError, match=r"prune\.reconstruct iterates"):
        prune_model(model, recipe, images)
    with pytest.raises(RecipeError, match=r"no image: prune\.reconstruct"):
        prune_model(model, recipe, [])


def repair_on(accelerator: Accelerator | None, folder: Path, case: tuple[str, str, tuple[int, ...]]) -> Model:
    """Prune and repair on micro-batch number k on rank k % world; with a single one, rank 1 has none."""
    rank, world = (0, 1) if accelerator is None else (accelerator.process_index, accelerator.num_processes)
    family, step, sizes = case
    model = make_base(family, folder)
    recipe = PruneRecipe(criterion="l1", ratio=0.5, round_to=1, rotate=False, reconstruct=step)
    return prune_model(model, recipe, batches_of(model, list(sizes))[rank::world], accelerator).model


def save_repaired(accelerator: Accelerator, folder: Path, cases: tuple[tuple[str, str, tuple[int, ...]], ...]) -> None:
    for number, case in enumerate(cases):
        model = repair_on(accelerator, folder, case)
        save_file(model.state_dict(), folder / f"{number} {accelerator.process_index}")


@pytest.mark.parametrize(
    "cases",
    [
        (("vit", "least_squares", (8, 8, 4)), ("resnet", "bn", (6,))),
        pytest.param(
            (("vit", "bias", (4,)), ("mobilenet_v2", "least_squares", (6,)), ("resnet", "bn", (6, 6))),
            marks=pytest.mark.faults,
        ),
    ],
    ids=["two", "others"],
)
@pytest.mark.faults
def test_two_ranks_repair_as_one_does(cases: tuple[tuple[str, str, tuple[int, ...]], ...], tmp_path: Path) -> None:
    work = functools.partial(save_repaired, folder=tmp_path, cases=cases)
    call_on_ranks(work, tmp_path / "log")
    for number, case in enumerate(cases):
        expected = repair_on(None, tmp_path, case).state_dict()
        first, second = (load_file(tmp_path / f"{number} {rank}") for rank in range(2))
        assert first.keys() == expected.keys()
        for name, value in expected.items():
            assert torch.equal(first[name], second[name]), name
            if value.is_floating_point():
                difference = (first[name] - value).norm()
                assert difference <= 1e-3 * value.norm() + 1e-5, f"{case} {name}"


def test_wide_network_is_not_fitted_to_few_images(tmp_path: Path) -> None:
    # Layers of 512 features; the last ones read 4 positions of each of 8 images.
    model = make_base("resnet-gn", tmp_path).eval()
    batches, fresh = batches_of(model, [4, 4]), make_images(model, 4, seed=9)
    bare, masks = cut(model)
    fitted = copy.deepcopy(bare)
    fit_layers(model, fitted, masks, Calibration(batches))
    # With weights fitted to so few rows, a third of the error and more is left.
    assert error(fitted, model, fresh) < 0.2 * error(bare, model, fresh)
