"""Measure how a CLIP names generated images after its tower of images was cut, without captions for the pruning.

A small CLIP is trained contrastively on shapes on the textures of photographs with captions such as "a red circle".
Each line has, on other scenes, the share of images whose own caption fits best of all captions, the share whose best
caption is that of the base, and the cosine similarity of the embeddings of images with those of the base.
torch-pruning is measured, too; its Taylor importance gets the true captions, by the network's own loss.

Run from the top of the repository:

    python benchmarks/zero_shot.py --shares 70 50
"""

import argparse
from collections.abc import Callable, Iterator
from functools import partial
from itertools import product

import numpy as np
import torch
from cut_table import Cut, add_arguments, open_base, print_cuts
from peer_cuts import peer_cuts
from PIL import Image
from scenes import SHAPES, shape_mask, texture
from torch import Tensor, nn
from transformers import CLIPConfig, CLIPModel

SIDE, BATCH = 32, 32
COLOURS = {
    "red": (220, 40, 40),
    "green": (40, 170, 60),
    "blue": (50, 70, 220),
    "yellow": (230, 210, 50),
    "purple": (150, 50, 170),
    "white": (245, 245, 245),
}
CAPTIONS = [f"a {colour} {shape}" for colour, shape in product(COLOURS, SHAPES)]
_WORDS = ["<pad>", "<start>", "a", *COLOURS, *SHAPES, "<end>"]
_LAYERS = {"hidden_size": 64, "num_attention_heads": 4, "intermediate_size": 192}
VISION = {**_LAYERS, "image_size": SIDE, "patch_size": 4, "num_hidden_layers": 4}
TEXT = {
    **_LAYERS,
    "num_hidden_layers": 2,
    "vocab_size": len(_WORDS),
    "max_position_embeddings": 8,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": len(_WORDS) - 1,
}
KEPT = ("visual_projection",)  # by torch-pruning: the width of the embeddings
STREAM = ("patch_embedding", "out_proj", "fc2")  # layers that write to the residual stream


def tokens_of(captions: list[str]) -> Tensor:
    """Return the numbers of the words of captions of three words, with a start and an end: (N, 5)."""
    return torch.tensor([[_WORDS.index(word) for word in f"<start> {text} <end>".split()] for text in captions])


def draw_scenes(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Return images (N, 3, 32, 32) and the numbers of their captions (N,), of which each is as frequent."""
    random = np.random.default_rng(seed)
    images, kinds = [], np.arange(count) % len(CAPTIONS)
    for kind in kinds:
        colour, shape = CAPTIONS[kind].split()[1:]
        size = random.uniform(12, 22)
        left, top = random.uniform(0, SIDE - size, 2)
        mask = shape_mask(shape, (left, top, left + size, top + size), SIDE)
        shade = np.clip(np.array(COLOURS[colour]) + random.normal(0, 20, 3), 0, 255).astype(int)
        filled = Image.blend(texture(random, SIDE), Image.new("RGB", (SIDE, SIDE), tuple(map(int, shade))), 0.7)
        image = texture(random, SIDE)
        image.paste(filled, mask=mask)
        images.append(torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 127.5 - 1)
    return torch.stack(images), torch.from_numpy(kinds)


def make_network() -> CLIPModel:
    return CLIPModel(CLIPConfig(vision_config=VISION, text_config=TEXT, projection_dim=32))


def train(images: Tensor, kinds: Tensor, steps: int) -> CLIPModel:
    """Train both towers on batches that have each caption once."""
    torch.manual_seed(0)
    network = make_network()
    places = [torch.nonzero(kinds == kind)[:, 0] for kind in range(len(CAPTIONS))]
    optimizer = torch.optim.AdamW(network.parameters(), 1e-3, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-3, total_steps=steps)
    for _ in range(steps):
        chosen = torch.stack([place[torch.randint(len(place), ())] for place in places])
        optimizer.zero_grad()
        loss_of(network, images[chosen], torch.arange(len(CAPTIONS))).backward()
        nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    return network.eval()


def loss_of(network: nn.Module, images: Tensor, kinds: Tensor) -> Tensor:
    """Return the network's own loss for images with captions of which each occurs once."""
    tokens = tokens_of([CAPTIONS[kind] for kind in kinds])
    return network(input_ids=tokens, pixel_values=images, return_loss=True).loss


@torch.no_grad()
def answers_of(network: nn.Module, images: Tensor) -> tuple[Tensor, Tensor]:
    """Return the number of the caption that fits each image best, (N,), and the embeddings of the images, (N, C)."""
    found = [network(input_ids=tokens_of(CAPTIONS), pixel_values=part) for part in images.split(64)]
    best = torch.cat([part.logits_per_image.argmax(1) for part in found])
    return best, torch.cat([part.image_embeds for part in found])


def measure(network: nn.Module, dense: nn.Module, images: Tensor, kinds: Tensor) -> list[str]:
    """Return the figures of a network as cells of the table."""
    (best, embeddings), (wanted, others) = answers_of(network, images), answers_of(dense, images)
    shares = [100 * float((best == truth).float().mean()) for truth in (kinds, wanted)]
    cosine = float(nn.functional.cosine_similarity(embeddings, others).mean())
    return [*(f"{share:.1f}" for share in shares), f"{cosine:.4f}"]


def cuts_with_and_without_stream(cuts: Callable[..., Iterator[Cut]], share: float) -> Iterator[Cut]:
    """Yield the cuts of all widths but that of the embeddings, then those that keep the residual stream, too."""
    yield from cuts(share, is_kept=lambda name: name in KEPT)
    for name, left, network in cuts(share, is_kept=lambda name: name.endswith(KEPT + STREAM)):
        yield f"{name}, stream kept", left, network


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    args = add_arguments(parser, steps=1200, scenes=4800).parse_args()
    dense = open_base(args.weights, make_network, lambda: train(*draw_scenes(args.scenes, seed=0), args.steps))
    scenes, kinds = draw_scenes(512, seed=1)
    batches = list(scenes.split(BATCH))
    pairs = zip(scenes.split(len(CAPTIONS)), kinds.split(len(CAPTIONS)), strict=True)  # each caption once
    cuts = partial(
        peer_cuts,
        dense,
        batches,
        [partial(loss_of, images=images, kinds=numbers) for images, numbers in pairs],
        output=lambda network, images: network.get_image_features(images).pooler_output.sum(),
    )
    peers = partial(cuts_with_and_without_stream, cuts)
    held_out = draw_scenes(1200, seed=2)
    titles = ["caption found %", "caption as the base %", "cosine"]
    print_cuts(dense, batches, titles, lambda network: measure(network, dense, *held_out), peers, args)


if __name__ == "__main__":
    main()
