"""Measure the classes of pixels of a pruned SegFormer on generated scenes, without labels for the pruning.

A small SegFormer is trained on shapes on the textures of photographs, whose masks are known exactly, and cut to shares
of its MACs in several ways. Each line has the mean IoU and the share of right pixels on other scenes, and the
share of pixels whose class is that of the base. torch-pruning is measured, too; its Taylor importance gets the masks.

Run from the top of the repository:

    python benchmarks/segmentation.py --shares 70 50
"""

import argparse
from functools import partial

import numpy as np
import torch
from cut_table import add_arguments, open_base, print_cuts
from peer_cuts import peer_cuts
from PIL import Image, ImageDraw
from sklearn.datasets import load_sample_images
from torch import Tensor, nn
from transformers import SegformerConfig, SegformerForSemanticSegmentation

from isoprune_hf.evaluation.masks import classes_at, count_pixels, mask_figures

SIDE, SHAPES, BATCH = 64, ("ellipse", "rectangle", "triangle"), 16
NETWORK = {
    "num_labels": len(SHAPES) + 1,
    "hidden_sizes": [24, 40, 64, 96],
    "depths": [1, 1, 1, 1],
    "num_attention_heads": [1, 2, 4, 8],
    "decoder_hidden_size": 64,
}
# torch-pruning keeps the logits and the residual streams of the stages: it cuts these to networks that do not run.
KEPT = ("classifier", "patch_embeddings", "o_proj", "fc2", "sequence_reduction")


def draw_scenes(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Return images (N, 3, 64, 64) and their masks (N, 64, 64): shapes with the textures of photographs."""
    random = np.random.default_rng(seed)
    photos = load_sample_images().images

    def texture() -> Image.Image:
        photo = photos[random.integers(len(photos))]
        top, left = (int(random.integers(size - SIDE)) for size in photo.shape[:2])
        return Image.fromarray(photo[top : top + SIDE, left : left + SIDE])

    images, masks = [], []
    for _ in range(count):
        image, mask = texture(), Image.new("L", (SIDE, SIDE))
        for _ in range(random.integers(1, 5)):
            kind = int(random.integers(len(SHAPES)))
            width, height = (int(size) for size in random.integers(14, 34, 2))
            left, top = (int(random.integers(SIDE - size)) for size in (width, height))
            shape = Image.new("L", (SIDE, SIDE))
            pen, box = ImageDraw.Draw(shape), (left, top, left + width, top + height)
            if SHAPES[kind] == "triangle":
                pen.polygon([(left, top + height), (left + width, top + height), (left + width // 2, top)], fill=255)
            else:
                getattr(pen, SHAPES[kind])(box, fill=255)
            colour = Image.new("RGB", (SIDE, SIDE), tuple(int(value) for value in random.integers(256, size=3)))
            image.paste(Image.blend(texture(), colour, 0.5), mask=shape)
            mask.paste(kind + 1, mask=shape)
        images.append(torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 127.5 - 1)
        masks.append(torch.from_numpy(np.array(mask)).long())
    return torch.stack(images), torch.stack(masks)


def make_network() -> SegformerForSemanticSegmentation:
    return SegformerForSemanticSegmentation(SegformerConfig(**NETWORK))


def train(images: Tensor, masks: Tensor, steps: int) -> SegformerForSemanticSegmentation:
    """Train a network on scenes."""
    torch.manual_seed(0)
    network = make_network()
    optimizer = torch.optim.AdamW(network.parameters(), 2e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps)
    for _ in range(steps):
        chosen = torch.randint(0, len(images), (BATCH,))
        optimizer.zero_grad()
        network(images[chosen], labels=masks[chosen]).loss.backward()
        optimizer.step()
        schedule.step()
    return network.eval()


@torch.no_grad()
def logits_of(network: nn.Module, images: Tensor) -> Tensor:
    return torch.cat([network(part).logits for part in images.split(50)])


def measure(network: nn.Module, dense: nn.Module, images: Tensor, masks: Tensor) -> list[str]:
    """Return the figures of a network as cells of the table."""
    found, wanted = logits_of(network, images), logits_of(dense, images)
    counts = sum(
        count_pixels(classes_at(logits, mask.shape), mask, len(SHAPES) + 1)
        for logits, mask in zip(found, masks, strict=True)
    )
    figures = mask_figures(counts)
    same = (found.argmax(1) == wanted.argmax(1)).float().mean()
    return [f"{100 * value:.1f}" for value in (figures["miou"], figures["pixel_accuracy"], float(same))]


def loss_of(network: nn.Module, images: Tensor, masks: Tensor) -> Tensor:
    """Return the network's own loss."""
    return network(images, labels=masks).loss


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    args = add_arguments(parser, steps=1500, scenes=2000, learning_rate=1e-3).parse_args()
    dense = open_base(args.weights, make_network, lambda: train(*draw_scenes(args.scenes, seed=0), args.steps))
    calibration, truths = draw_scenes(512, seed=1)
    held_out = draw_scenes(300, seed=2)
    batches = list(calibration.split(BATCH))
    losses = [
        partial(loss_of, images=images, masks=masks)
        for images, masks in zip(batches, truths.split(BATCH), strict=True)
    ]
    peers = partial(
        peer_cuts,
        dense,
        batches,
        losses,
        is_kept=lambda name: any(part in name for part in KEPT),
        output=lambda network, images: network(images).logits.sum(),
    )
    titles = ["mIoU %", "right pixels %", "pixels as the base %"]
    print_cuts(dense, batches, titles, lambda network: measure(network, dense, *held_out), peers, args)


if __name__ == "__main__":
    main()
