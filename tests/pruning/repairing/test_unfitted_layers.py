"""Layers that a repair leaves as they were cut, and outputs that lose channels among their rows."""

import copy
from collections.abc import Callable

import numpy as np
import pytest
import timm
import torch
from helpers.odd_networks import WIDTH, TokenNet, calibration_batches, open_odd
from timm.layers import LayerNormAct
from torch import Tensor, nn

from isoprune_hf import PruneRecipe, prune_model
from isoprune_hf.checkpoint.modeling_isoprune import IsoPruneConfig, IsoPruneForImageClassification
from isoprune_hf.errors import RecipeError
from isoprune_hf.models.feature_loss import FEATURES
from isoprune_hf.models.held import HeldModel
from isoprune_hf.pruning import pipeline
from isoprune_hf.pruning.calibration.calibration import Calibration
from isoprune_hf.pruning.cutting.cut import apply_plan, keep_masks
from isoprune_hf.pruning.graph.find_groups import TracedGroups, trace_groups
from isoprune_hf.pruning.graph.output_masks import output_masks
from isoprune_hf.pruning.plan import PruningPlan
from isoprune_hf.pruning.repairing.fit_layers import fit_layers
from isoprune_hf.pruning.repairing.fitted_rows import size_of
from isoprune_hf.pruning.repairing.kernel_equations import KernelEquations
from isoprune_hf.pruning.repairing.normal_equations import NormalEquations
from isoprune_hf.pruning.repairing.repair import repair
from isoprune_hf.pruning.repairing.repairs.batchnorm import recalibrate_batchnorm
from isoprune_hf.pruning.repairing.rotation import Rotated

Model = IsoPruneForImageClassification


def cut_in_half(name: str) -> tuple[Model, Model, PruningPlan]:
    """Open an odd network, and cut every group that is no attention to half of its channels."""
    dense = open_odd(name).model.eval()
    groups = trace_groups(dense)
    plan = PruningPlan({group.name: tuple(range(0, group.channels, 2)) for group in groups if not group.num_heads}, {})
    return dense, apply_plan(dense, plan, groups), plan


def repaired(dense: Model, pruned: Model, plan: PruningPlan) -> tuple[str, ...]:
    calibration = Calibration(calibration_batches(3))
    return repair(Rotated(dense, (), ()), pruned, plan, trace_groups(dense), "least_squares", calibration)


def logit_error(dense: Model, pruned: Model) -> float:
    images = calibration_batches(3)[0][0]
    with torch.no_grad():
        return float((dense(images).logits - pruned(images).logits).square().sum())


def test_weight_of_two_layers_is_left_as_cut() -> None:
    dense, pruned, plan = cut_in_half("shared_parameter")
    before = copy.deepcopy(pruned.state_dict())
    notes = repaired(dense, pruned, plan)
    after = pruned.state_dict()
    shared = [name for name in before if name.startswith(("model.first", "model.second"))]
    assert all(torch.equal(before[name], after[name]) for name in shared)
    assert not torch.equal(before["model.head.bias"], after["model.head.bias"])
    assert len(notes) == 1 and all(layer in notes[0] for layer in ("first.up", "first.down", "second.up"))


def test_module_with_two_names_is_fitted() -> None:
    dense, pruned, plan = cut_in_half("two_names")
    before = logit_error(dense, pruned)
    assert repaired(dense, pruned, plan) == ()
    assert logit_error(dense, pruned) < before


def test_linear_over_tokens_is_fitted_on_kept_rows() -> None:
    dense, pruned, plan = cut_in_half("token_mixer")
    groups = trace_groups(dense)
    masks = keep_masks(plan, groups, dense.model)
    before = logit_error(dense, pruned)
    with_biases = copy.deepcopy(pruned)
    images, outputs = Calibration(calibration_batches(3)), output_masks(groups.graph, masks)
    assert fit_layers(dense, with_biases, masks, images, outputs=outputs, is_bias_only=True) == ()
    assert not torch.equal(pruned.model.mix.bias, with_biases.model.mix.bias)
    assert fit_layers(dense, pruned, masks, images, outputs=outputs) == ()
    assert logit_error(dense, pruned) < before


def cut_mixer() -> tuple[Model, Model, dict[tuple[str, int], np.ndarray], TracedGroups]:
    """Cut the mixer, and return its masks with another mask that fits the rows of its linears as well."""
    dense, pruned, plan = cut_in_half("token_mixer")
    groups = trace_groups(dense)
    masks = keep_masks(plan, groups, dense.model)
    masks["other", 0] = ~next(mask for (name, dim), mask in masks.items() if (name, dim) == ("stem.weight", 0))
    return dense, pruned, masks, groups


def test_rows_without_traced_axes_are_left_as_cut() -> None:
    dense, pruned, masks, _ = cut_mixer()
    before = copy.deepcopy(pruned.model.mix.state_dict())
    notes = fit_layers(dense, pruned, masks, Calibration(calibration_batches(3)))
    assert all(torch.equal(value, before[name]) for name, value in pruned.model.mix.state_dict().items())
    assert len(notes) == 1 and "mix, back" in notes[0]


def test_rows_are_those_of_the_traced_axis() -> None:
    dense, pruned, masks, groups = cut_mixer()
    fitted, expected = copy.deepcopy(pruned), copy.deepcopy(pruned)
    calibration = Calibration(calibration_batches(3))
    outputs = output_masks(groups.graph, masks)
    assert fit_layers(dense, fitted, masks, calibration, outputs=outputs) == ()
    by_hand = {name: [{1: masks["stem.weight", 0]}] for name in ("mix", "back")}
    assert fit_layers(dense, expected, masks, calibration, outputs=by_hand) == ()
    assert all(torch.equal(value, fitted.state_dict()[name]) for name, value in expected.state_dict().items())
    assert logit_error(dense, fitted) < logit_error(dense, pruned)


def test_rows_of_another_size_are_left_as_cut() -> None:
    dense, pruned, masks, _ = cut_mixer()
    wrong = {name: [{1: masks["stem.weight", 0] & (np.arange(32) > 7)}] for name in ("mix", "back")}
    (note,) = fit_layers(dense, pruned, masks, Calibration(calibration_batches(3)), outputs=wrong)
    assert "mix, back" in note


class ActiveNorm(TokenNet):
    """A LayerNorm applies an activation to its result."""

    def build(self) -> None:
        self.norm, self.plain = LayerNormAct(WIDTH, act_layer=nn.SiLU), LayerNormAct(WIDTH, apply_act=False)
        self.up, self.down = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def body(self, x: Tensor) -> Tensor:
        return self.plain(x + self.down(self.norm(self.up(x))))


@timm.models.register_model
def isoprune_test_active_norm(num_classes: int = 5, **_: object) -> nn.Module:
    return ActiveNorm(num_classes)


def test_norm_with_activation_is_left_as_cut() -> None:
    base = {"library": "timm", "architecture": "isoprune_test_active_norm", "args": {}}
    torch.manual_seed(0)
    dense = Model(IsoPruneConfig(base=base, num_labels=5, image_size=[3, 32, 32])).eval()
    groups = trace_groups(dense)
    plan = PruningPlan({group.name: tuple(range(0, group.channels, 2)) for group in groups}, {})
    pruned = apply_plan(dense, plan, groups)
    before = copy.deepcopy(pruned.model)
    (note,) = repaired(dense, pruned, plan)
    assert "norm" in note and "plain" not in note
    assert torch.equal(pruned.model.norm.weight, before.norm.weight)
    assert not torch.equal(pruned.model.plain.weight, before.plain.weight)


class Standardised(nn.Conv2d):
    """A convolution whose weight is standardised in each pass, as those of BiT."""

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        return nn.functional.conv2d(x, weight, self.bias)


def test_model_without_fitted_layers_says_so() -> None:
    network = nn.Sequential(Standardised(3, 8, 1), nn.ReLU(), Standardised(8, 4, 1))
    dense = HeldModel(IsoPruneConfig(image_size=[3, 4, 4]), network, FEATURES).eval()
    plan = PruningPlan({"0": (0, 2, 5)}, {})
    pruned = apply_plan(dense, plan)
    calibration = Calibration([(torch.randn(4, 3, 4, 4), torch.zeros(4))])
    notes = fit_layers(dense, pruned, keep_masks(plan, trace_groups(dense), dense.model), calibration)
    assert notes == (
        "prune.reconstruct changes nothing: the model has no layer that can be fitted",
        "left as cut by prune.reconstruct: 2 layers (2: they are of types that it cannot fit: 0, 2)",
    )


def test_layer_above_the_limit_is_left_as_cut() -> None:
    dense, pruned, plan = cut_in_half("reused")
    before = copy.deepcopy(pruned.state_dict())
    masks = keep_masks(plan, trace_groups(dense), dense.model)
    fitted = copy.deepcopy(pruned)
    (note,) = fit_layers(dense, fitted, masks, Calibration(calibration_batches(3)), max_bytes=0)
    assert all(torch.equal(value, before[name]) for name, value in fitted.state_dict().items())
    assert "too much memory" in note and "\n" not in note
    limit = NormalEquations.bytes_of(size_of(pruned.model.block.conv1), 0) - 1  # the head needs less
    (note,) = fit_layers(dense, pruned, masks, Calibration(calibration_batches(3)), max_bytes=limit)
    assert "block.conv1" in note and "head" not in note
    assert torch.equal(pruned.model.block.conv1.weight, before["model.block.conv1.weight"])
    assert not torch.equal(pruned.model.head.bias, before["model.head.bias"])


def test_fit_that_is_not_finite_leaves_the_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    dense, pruned, plan = cut_in_half("reused")
    before = copy.deepcopy(pruned.state_dict())
    for form in (NormalEquations, KernelEquations):

        def solve_nan(
            *args: object, solve: Callable[..., torch.Tensor] = form.solve, **kwargs: object
        ) -> torch.Tensor:
            return torch.full_like(solve(*args, **kwargs), float("nan"))

        monkeypatch.setattr(form, "solve", solve_nan)
    monkeypatch.setattr("isoprune_hf.pruning.repairing.ridge.choose_ridge", lambda *args, **kwargs: 0.1)
    masks = keep_masks(plan, trace_groups(dense), dense.model)
    notes = fit_layers(dense, pruned, masks, Calibration(calibration_batches(3)))
    assert all(torch.equal(value, before[name]) for name, value in pruned.state_dict().items())
    assert len(notes) == 1 and "not finite" in notes[0]


def test_statistics_that_are_not_finite_are_left() -> None:
    _, pruned, _ = cut_in_half("reused")
    with torch.no_grad():
        pruned.model.other.conv1.weight.mul_(1e30)  # the variance is above the largest float32
    before = pruned.model.other.norm1.running_var.clone()
    notes = recalibrate_batchnorm(pruned, Calibration(calibration_batches(3)))
    assert torch.equal(pruned.model.other.norm1.running_var, before)
    assert len(notes) == 1 and "other.norm1" in notes[0]


def test_result_with_nan_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    def damage(rotated: Rotated, pruned: Model, *args: object, **kwargs: object) -> tuple[str, ...]:
        nn.init.constant_(pruned.model.head.bias, float("nan"))
        return ()

    monkeypatch.setattr(pipeline, "repair", damage)
    recipe = PruneRecipe(target_macs="50%", round_to=1, criterion="l1")
    with pytest.raises(RecipeError, match="head"):
        prune_model(open_odd("reused").model, recipe, calibration_batches(3))


def test_batchnorm_of_one_value_keeps_its_statistics() -> None:
    """The block runs three times on the one image, the other block once."""
    _, pruned, _ = cut_in_half("reused")
    before = copy.deepcopy(pruned.state_dict())
    images, labels = calibration_batches(3)[0]
    notes = recalibrate_batchnorm(pruned, Calibration([(images[:1, :, :4, :4], labels[:1])]))
    changed = {name for name, value in pruned.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == {f"model.block.norm{number}.running_{kind}" for number in (1, 2) for kind in ("mean", "var")}
    assert len(notes) == 1 and "fewer than two values" in notes[0] and "other.norm1" in notes[0]


@pytest.mark.parametrize(("size", "is_kept"), [(0.0, True), (1e-3, False)])
def test_constant_inputs_keep_their_variance(size: float, is_kept: bool) -> None:
    _, pruned, _ = cut_in_half("reused")
    norm = pruned.model.other.norm1
    with torch.no_grad():
        for parameter in pruned.model.other.conv1.parameters():
            parameter.mul_(size)
    before = norm.running_var.clone()
    recalibrate_batchnorm(pruned, Calibration(calibration_batches(3)))
    assert torch.equal(norm.running_var, before) is is_kept
