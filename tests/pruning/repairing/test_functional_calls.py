"""The calls of linear and conv2d with a layer's own weight, and what they compute."""

import numpy as np
import pytest
import torch
from helpers.odd_networks import calibration_batches, open_odd
from torch import nn
from torch.nn import functional

from isoprune_hf.pruning.calibration.calibration import Calibration
from isoprune_hf.pruning.cutting.cut import apply_plan, keep_masks
from isoprune_hf.pruning.graph.find_groups import trace_groups
from isoprune_hf.pruning.plan import PruningPlan
from isoprune_hf.pruning.repairing.fit_layers import fit_layers
from isoprune_hf.pruning.repairing.functional_calls import FunctionalProbe


class PaddedConv(nn.Conv2d):
    """Pads below and right by ones first."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = functional.pad(x, (0, 1, 0, 1), value=1.0)
        return functional.conv2d(input=x, weight=self.weight, bias=self.bias, stride=self.stride)


class ScaledWeight(nn.Linear):
    """Multiplies with another tensor than its weight."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return functional.linear(x, 2 * self.weight, self.bias)


class ScaledOutput(nn.Linear):
    """Changes the output."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * super().forward(x)


class LateBias(nn.Linear):
    """Adds the bias afterwards."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return functional.linear(x, self.weight) + self.bias


LAYERS: dict[str, nn.Module] = {
    "plain": nn.Conv2d(4, 6, 3),
    "strided": nn.Conv2d(4, 6, (3, 2), stride=(2, 1), padding=(1, 0), dilation=(1, 2)),
    "same": nn.Conv2d(4, 6, (4, 3), padding="same", dilation=2, bias=False),
    "valid": nn.Conv2d(4, 6, 3, padding="valid"),
    "reflected": nn.Conv2d(4, 6, 3, padding=1, padding_mode="reflect"),
    "grouped": nn.Conv2d(4, 6, 3, groups=2),
    "padded by itself": PaddedConv(4, 6, 3, stride=2),
}


@pytest.mark.parametrize("name", LAYERS)
def test_patches_times_weight_are_the_output(name: str) -> None:
    layer = LAYERS[name].double()
    x = torch.randn(2, 4, 7, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    with torch.no_grad(), FunctionalProbe([layer]) as probe:
        output = layer(x)
    call = probe.call_of(layer, output)
    assert call is not None and call.window is not None
    rows = call.window.patches(call.inputs).flatten(4).flatten(1, 3).numpy()
    weights = layer.weight.detach().reshape(len(rows), 6 // len(rows), -1).numpy()
    bias = 0 if layer.bias is None else layer.bias.detach().numpy()
    found = np.concatenate([part @ weight.T for part, weight in zip(rows, weights, strict=True)], axis=1) + bias
    np.testing.assert_allclose(found, output.movedim(1, -1).reshape(-1, 6).numpy(), atol=1e-12)


@pytest.mark.parametrize("layer", [ScaledWeight(4, 3), ScaledOutput(4, 3), LateBias(4, 3)])
def test_other_function_than_the_own_one_is_none(layer: nn.Linear) -> None:
    plain = nn.Linear(4, 3)
    with FunctionalProbe([layer, plain]) as probe:
        outputs = [module(torch.ones(2, 4)) for module in (layer, plain)]
    assert probe.call_of(layer, outputs[0]) is None
    call = probe.call_of(plain, outputs[1])
    assert call is not None and call.window is None


def test_layer_that_pads_by_itself_is_fitted() -> None:
    dense = open_odd("pads_by_itself").model.eval()
    groups = trace_groups(dense)
    plan = PruningPlan({group.name: tuple(range(0, group.channels, 2)) for group in groups}, {})
    pruned = apply_plan(dense, plan, groups)
    before = {name: value.clone() for name, value in pruned.model.named_parameters()}
    notes = fit_layers(dense, pruned, keep_masks(plan, groups, dense.model), Calibration(calibration_batches(3)))
    changed = {name for name, value in pruned.model.named_parameters() if not torch.equal(value, before[name])}
    assert "padded.weight" in changed
    assert "doubled.weight" not in changed
    assert len(notes) == 1 and "doubled" in notes[0]
