"""One pass through the dense network serves many layers of a fit."""

import copy
from functools import partial

import pytest
import torch
from helpers.odd_networks import calibration_batches, open_odd
from torch import nn

from isoprune_hf.checkpoint.modeling_isoprune import IsoPruneForImageClassification
from isoprune_hf.pruning.calibration.calibration import Calibration
from isoprune_hf.pruning.calibration.gradients import scoring_mode
from isoprune_hf.pruning.cutting.cut import apply_plan, keep_masks
from isoprune_hf.pruning.graph.find_groups import trace_groups
from isoprune_hf.pruning.partial_passes.passes import Images, Passes
from isoprune_hf.pruning.partial_passes.storage import Storage
from isoprune_hf.pruning.partial_passes.waypoints import find_waypoints
from isoprune_hf.pruning.plan import PruningPlan
from isoprune_hf.pruning.repairing import fit_layers
from isoprune_hf.pruning.repairing.dense_outputs import DenseOutputs
from isoprune_hf.pruning.repairing.layer_calls import FittedLayer, find_layers, observe_calls

Model = IsoPruneForImageClassification


def cut(name: str) -> tuple[Model, Model, dict]:
    dense = open_odd(name).model.eval()
    groups = trace_groups(dense)
    plan = PruningPlan({group.name: tuple(range(0, group.channels, 2)) for group in groups if not group.num_heads}, {})
    return dense, apply_plan(dense, plan, groups), keep_masks(plan, groups, dense.model)


def kept(values: torch.Tensor, layer: FittedLayer) -> torch.Tensor:
    return values if layer.kept is None else values.index_select(layer.dim, layer.kept)


@pytest.mark.parametrize("name", ["keyword_calls", "reused", "writes_in_place", "channel_attention"])
@pytest.mark.parametrize("max_bytes", [0, 20_000, 2**30])
def test_outputs_equal_one_pass_for_each_layer(name: str, max_bytes: int) -> None:
    dense, pruned, masks = cut(name)
    batches = calibration_batches(3)
    with scoring_mode(dense, requires_grad=False), scoring_mode(pruned, requires_grad=False), torch.no_grad():
        layers, _ = find_layers(dense, pruned, masks, {}, {})
        find = partial(find_waypoints, dense, [layer.name for layer in layers])
        passes = Passes(dense, Images([images for images, _ in batches]), find, Storage(dense.device))
        outputs = DenseOutputs(passes, layers, max_bytes)
        for layer in layers:
            for (images, _), calls in zip(batches, outputs.of_next(), strict=True):
                expected = observe_calls(dense, layer, images)
                assert len(calls) == len(expected) == layer.calls
                for call, other in zip(calls, expected, strict=True):
                    assert torch.equal(call.output, kept(other.output, layer))
                    assert (call.stream is None) == (other.stream is None)
                    assert call.stream is None or torch.equal(call.stream, kept(other.stream, layer))


def test_each_layer_of_the_dense_network_runs_once(monkeypatch: pytest.MonkeyPatch) -> None:
    dense, pruned, masks = cut("writes_in_place")  # four layers
    batches = calibration_batches(3)
    ran, counts, weights, convolve = [], [], [], nn.Conv2d.forward
    convolutions = [part for part in dense.modules() if isinstance(part, nn.Conv2d)]
    watch = lambda self, x: ran.append((self, len(x))) or convolve(self, x)  # noqa: E731
    monkeypatch.setattr(nn.Conv2d, "forward", watch)
    for max_bytes in (2**30, 0):
        monkeypatch.setattr(fit_layers, "DenseOutputs", partial(DenseOutputs, max_bytes=max_bytes))
        network = copy.deepcopy(pruned)
        fit_layers.fit_layers(dense, network, masks, Calibration(batches))
        weights.append(network.state_dict())
        counts.append([ran.count((part, len(batches[0][0]))) for part in convolutions])
        ran.clear()
    assert counts == [[len(batches)] * len(convolutions)] * 2
    assert all(torch.equal(value, weights[1][name]) for name, value in weights[0].items())
    assert not torch.equal(weights[0]["model.conv2.weight"], pruned.state_dict()["model.conv2.weight"])
