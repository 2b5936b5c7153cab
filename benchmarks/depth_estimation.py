"""Measure the depths of a pruned GLPN on generated scenes, without depths for the pruning.

A small GLPN is trained on scenes whose depth is known exactly: a floor, a wall behind it, and shapes of one size that
stand on the floor, with the textures of photographs, in a thin haze, and cut to shares of its MACs in several ways.
Each line has, on other scenes, the mean relative error of the depth (AbsRel) and the share of pixels whose depth is
less than 1.25 times off the true one, and off that of the base. torch-pruning is measured, too; its Taylor importance
gets the true depths, by the loss that the network was trained with.

Run from the top of the repository:

    python benchmarks/depth_estimation.py --shares 70 50
"""

import argparse
from functools import partial

import numpy as np
import torch
from cut_table import add_arguments, open_base, print_cuts
from peer_cuts import peer_cuts
from PIL import Image
from scenes import SHAPES, shape_mask, texture
from torch import Tensor, nn
from transformers import GLPNConfig, GLPNForDepthEstimation

from isoprune_hf.evaluation.depth import near_depths

SIDE, FOCAL, BATCH = 64, 64.0, 16  # pixels; the camera is 1 unit above the floor
HAZE, GREY = 12.0, 200.0  # depth at which a share of 1/e of the colour is left, and the colour of the haze
NETWORK = {
    "hidden_sizes": [24, 40, 64, 96],
    "depths": [1, 1, 1, 1],
    "num_attention_heads": [1, 2, 4, 8],
    "decoder_hidden_size": 24,
    "max_depth": 10,
    "drop_path_rate": 0.0,
}
# torch-pruning keeps the depths, and the residual streams of the three stages that reduce their sequences: with these,
# its cut does not run. It cuts that of the last stage.
STREAMS = (
    "patch_embeddings.{}.",
    "block.{}.0.attention.output",
    "block.{}.0.attention.self.sr",
    "block.{}.0.mlp.dense2",
)
KEPT = ("head.head.2", *(part.format(stage) for stage in range(3) for part in STREAMS))


def draw_scenes(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Return images (N, 3, 64, 64) and the depth of their pixels (N, 64, 64), in heights of the camera."""
    random = np.random.default_rng(seed)
    pairs = [_draw_scene(random) for _ in range(count)]
    images = torch.from_numpy(np.stack([np.array(image) for image, _ in pairs])).permute(0, 3, 1, 2)
    return images.float() / 127.5 - 1, torch.from_numpy(np.stack([depth for _, depth in pairs])).float()


def _draw_scene(random: np.random.Generator) -> tuple[Image.Image, np.ndarray]:
    """Return an image and its depths: a point of the floor at depth z is 64 / z rows below the horizon."""
    horizon, wall = random.uniform(8, 24), random.uniform(4, 10)
    below = np.maximum(np.arange(SIDE) + 0.5 - horizon, 1e-3)
    depth = np.repeat(np.minimum(FOCAL / below, wall)[:, None], SIDE, 1)
    image = texture(random, SIDE)
    image.paste(texture(random, SIDE), mask=Image.fromarray((depth < wall).astype(np.uint8) * 255))
    for distance in sorted(random.uniform(1.8, wall, random.integers(1, 5)), reverse=True):
        size = FOCAL / distance  # of a shape of the height of the camera
        left, foot = random.uniform(-size / 2, SIDE - size / 2), horizon + FOCAL / distance
        mask = shape_mask(SHAPES[random.integers(len(SHAPES))], (left, foot - size, left + size, foot), SIDE)
        colour = Image.new("RGB", (SIDE, SIDE), tuple(int(value) for value in random.integers(256, size=3)))
        image.paste(Image.blend(texture(random, SIDE), colour, 0.6), mask=mask)
        depth[np.array(mask) > 0] = distance
    clear = np.exp(-depth / HAZE)[:, :, None]
    return Image.fromarray((np.array(image) * clear + GREY * (1 - clear)).astype(np.uint8)), depth


def make_network() -> GLPNForDepthEstimation:
    return GLPNForDepthEstimation(GLPNConfig(**NETWORK))


def train(images: Tensor, depths: Tensor, steps: int) -> GLPNForDepthEstimation:
    """Train a network on scenes by the relative error of its depths."""
    torch.manual_seed(0)
    network = make_network()
    optimizer = torch.optim.AdamW(network.parameters(), 2e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps)
    for _ in range(steps):
        chosen = torch.randint(0, len(images), (BATCH,))
        optimizer.zero_grad()
        loss_of(network, images[chosen], depths[chosen]).backward()
        nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    return network.eval()


def at_size(depths: Tensor) -> Tensor:
    """Return depths (B, h, w) resized to those of the scenes, (B, 64, 64)."""
    return nn.functional.interpolate(depths[:, None], size=(SIDE, SIDE), mode="bilinear")[:, 0]


def relative_error(found: Tensor, depths: Tensor) -> Tensor:
    """Return the mean of |found - depth| / depth."""
    return ((found - depths).abs() / depths).mean()


def loss_of(network: nn.Module, images: Tensor, depths: Tensor) -> Tensor:
    """Return the loss that the network is trained by."""
    return relative_error(at_size(network(images).predicted_depth), depths)


@torch.no_grad()
def depths_of(network: nn.Module, images: Tensor) -> Tensor:
    """Return the depths that a network finds at the size of the scenes, (N, 64, 64)."""
    return torch.cat([at_size(network(part).predicted_depth) for part in images.split(50)])


def measure(network: nn.Module, dense: nn.Module, images: Tensor, depths: Tensor) -> list[str]:
    """Return the figures of a network as cells of the table."""
    found, wanted = depths_of(network, images), depths_of(dense, images)
    near = [100 * near_depths([found], [others]).mean() for others in (depths, wanted)]
    return [f"{relative_error(found, depths):.4f}", *(f"{share:.1f}" for share in near)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    args = add_arguments(parser, steps=1500, scenes=2000).parse_args()
    dense = open_base(args.weights, make_network, lambda: train(*draw_scenes(args.scenes, seed=0), args.steps))
    batches, truths = (list(part.split(BATCH)) for part in draw_scenes(512, seed=1))
    peers = partial(
        peer_cuts,
        dense,
        batches,
        [partial(loss_of, images=images, depths=depths) for images, depths in zip(batches, truths, strict=True)],
        is_kept=lambda name: any(part in name for part in KEPT),
        output=lambda network, images: network(images).predicted_depth.sum(),
    )
    held_out = draw_scenes(300, seed=2)
    titles = ["AbsRel", "within 1.25 of the truth %", "within 1.25 of the base %"]
    print_cuts(dense, batches, titles, lambda network: measure(network, dense, *held_out), peers, args)


if __name__ == "__main__":
    main()
