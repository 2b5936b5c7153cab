"""The layers to fit are found in one pass of each network."""

import copy

import pytest
import torch
from helpers.odd_networks import calibration_batches, open_odd

from isoprune_hf.pruning.repairing.layer_calls import find_layers, observe_calls

ADDED = {
    "keyword_calls": {"conv2"},
    "two_names": {"between.down"},
    "zero_scale": {"blocks.0.conv2", "blocks.1.conv2"},
}


@pytest.mark.parametrize("name", ADDED)
def test_layers_are_found_in_one_pass_each(name: str) -> None:
    dense = open_odd(name).model.eval()
    pruned = copy.deepcopy(dense)
    passes = []
    for network in (dense, pruned):
        network.register_forward_hook(lambda module, args, output: passes.append(module))
    with torch.no_grad():
        layers, left = find_layers(dense, pruned, {}, {}, {})
        assert passes == [dense, pruned] and not left
        assert {layer.name for layer in layers if layer.is_added} == ADDED[name]
        for layer in layers:  # an independent path: a pass for each layer alone
            alone = layer._replace(is_added=layer.calls == 1)
            calls = observe_calls(pruned, alone, calibration_batches(3)[0][0])
            assert (calls[0].stream is not None) == layer.is_added
