"""Depths are compared with the dense ones: the share that is near, and the relative difference."""

import torch

from isoprune_hf.evaluation.depth import depth_difference, near_depths


def test_near_depths_are_within_a_quarter() -> None:
    wanted = torch.tensor([[[4.0, 4.0, 4.0, 4.0, 0.0, 0.0]]])
    found = torch.tensor([[[5.0, 3.2, 5.1, 3.1, 0.0, 0.1]]])
    torch.testing.assert_close(near_depths([found], [wanted]), torch.tensor([3 / 6], dtype=torch.float64))


def test_difference_is_relative_to_the_mean() -> None:
    wanted = torch.tensor([[[1.0, 3.0]], [[0.0, 2.0]]])
    found = torch.tensor([[[2.0, 3.0]], [[0.0, 1.0]]])
    torch.testing.assert_close(depth_difference([found], [wanted]), torch.tensor([0.25, 0.5], dtype=torch.float64))
    assert torch.equal(depth_difference([wanted], [wanted]), torch.zeros(2, dtype=torch.float64))
