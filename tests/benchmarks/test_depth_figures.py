"""The benchmark of depth: its scenes have exact depths, a network that knows them is right, a peer keeps streams."""

import pytest
import torch
from depth_estimation import KEPT, SIDE, draw_scenes, make_network, measure
from peer_cuts import IMPORTANCES, cut
from torch import nn
from transformers.modeling_outputs import DepthEstimatorOutput

pytestmark = pytest.mark.benchmarks


class Knowing(nn.Module):
    """Gives a multiple of the depths of the images that it was built with."""

    def __init__(self, images: torch.Tensor, depths: torch.Tensor, factor: float):
        super().__init__()
        self.answers = {image.numpy().tobytes(): factor * depth for image, depth in zip(images, depths, strict=True)}

    def forward(self, images: torch.Tensor) -> DepthEstimatorOutput:
        return DepthEstimatorOutput(
            predicted_depth=torch.stack([self.answers[image.numpy().tobytes()] for image in images])
        )


def test_scenes_have_depths_of_a_floor_and_wall() -> None:
    images, depths = draw_scenes(8, seed=5)
    assert images.shape == (8, 3, SIDE, SIDE) and depths.shape == (8, SIDE, SIDE) and images.abs().max() <= 1
    assert (depths > 1).all() and (depths <= 10).all()
    assert (depths[:, -1].amax(1) < depths[:, 0].amax(1)).all()  # the floor is nearest at the foot of an image
    assert torch.equal(draw_scenes(8, seed=5)[1], depths)


def test_right_depths_are_near_and_doubled_are_not() -> None:
    images, depths = draw_scenes(4, seed=5)
    right, double = Knowing(images, depths, 1.0), Knowing(images, depths, 2.0)
    assert measure(right, right, images, depths) == ["0.0000", "100.0", "100.0"]
    assert measure(double, right, images, depths) == ["1.0000", "0.0", "0.0"]


def test_peer_keeps_streams_of_three_stages() -> None:
    torch.manual_seed(0)
    network = make_network().eval()
    for parameter in network.parameters():
        parameter.grad = torch.zeros_like(parameter)
    pruned = cut(
        network,
        torch.zeros(1, 3, SIDE, SIDE),
        0.5,
        IMPORTANCES["torch-pruning, isomorphic, l2"],
        lambda name: any(part in name for part in KEPT),
        lambda network, images: network(images).predicted_depth.sum(),
    )
    widths = [layer.proj.out_channels for layer in pruned.glpn.encoder.patch_embeddings]
    assert widths[:3] == [24, 40, 64] and widths[3] < 96
    assert pruned(torch.zeros(1, 3, SIDE, SIDE)).predicted_depth.shape == (1, SIDE, SIDE)
