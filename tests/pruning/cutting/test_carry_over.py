"""The elements that two cuts of one network share."""

import numpy as np
import torch
from torch import nn

from isoprune_hf.pruning.cutting.carry_over import carry_over


def mask(size: int, *kept: int) -> np.ndarray:
    found = np.zeros(size, dtype=bool)
    found[list(kept)] = True
    return found


def test_common_elements_are_copied() -> None:
    source, target = nn.Linear(3, 3), nn.Linear(2, 3)
    before = target.weight.detach().numpy().copy()
    # Of a base with 5 outputs and 4 inputs; one output of the target is not in the source.
    source_masks = {("weight", 0): mask(5, 0, 2, 3), ("weight", 1): mask(4, 0, 1, 3), ("bias", 0): mask(5, 0, 2, 3)}
    target_masks = {("weight", 0): mask(5, 2, 3, 4), ("weight", 1): mask(4, 1, 3), ("bias", 0): mask(5, 2, 3, 4)}
    bias = target.bias[2].item()
    carry_over(source, source_masks, target, target_masks)
    weight = source.weight.detach().numpy()
    expected = np.array([weight[1, [1, 2]], weight[2, [1, 2]], before[2]])
    np.testing.assert_array_equal(target.weight.detach().numpy(), expected)
    assert target.bias.tolist() == [source.bias[1].item(), source.bias[2].item(), bias]


def test_whole_tensors_and_buffers_are_copied() -> None:
    source, target = nn.BatchNorm1d(4), nn.BatchNorm1d(2)
    for part in (source.weight, source.running_mean):
        nn.init.normal_(part)
    source.num_batches_tracked.fill_(7)
    kept = mask(4, 1, 3)
    names = ("weight", "bias", "running_mean", "running_var")
    carry_over(source, {}, target, {(name, 0): kept for name in names})
    assert torch.equal(target.weight, source.weight[[1, 3]])
    assert torch.equal(target.running_mean, source.running_mean[[1, 3]])
    assert target.num_batches_tracked == 7


def test_tensors_of_other_shapes_are_left() -> None:
    source, target = nn.Linear(3, 3), nn.Linear(2, 3)
    before = target.weight.detach().clone()
    carry_over(source, {}, target, {})
    assert torch.equal(target.weight, before)
    assert torch.equal(target.bias, source.bias)
