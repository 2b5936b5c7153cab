"""Prune an encoder for its features: how near they stay to those of the base, before and after repair and finetuning.

    python benchmarks/features.py [--shares 50 25] [--steps 400] [--epochs 20]

A small Dinov2 is trained with a head on 1,347 of the handwritten digits of scikit-learn; the encoder alone is pruned,
on 512 of them without their labels, and measured on the other 450 images. `head` is the accuracy of the head that was
trained with the dense encoder, on the features of the pruned one. torch-pruning gets the digits with their labels, and
keeps the stream of tokens, which the features are. Prints a table in Markdown.
"""

import argparse
from functools import partial

import torch
from cut_table import add_arguments, print_cuts
from peer_cuts import peer_cuts
from sklearn.datasets import load_digits
from torch import Tensor, nn
from transformers import Dinov2Config, Dinov2Model

from isoprune_hf.evaluation.features import find_by_neighbours

TRAINED, CALIBRATION, BATCH = 1347, 512, 64
NETWORK = {"image_size": 16, "patch_size": 4, "hidden_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4}
KEPT = ("projection", "output.dense", "fc2")  # layers that write the features


def read_digits() -> tuple[Tensor, Tensor]:
    """Return the images (N, 3, 16, 16) and labels (N,) in an order drawn from a seed."""
    found = load_digits()
    images = torch.tensor(found.images / 8 - 1, dtype=torch.float32)[:, None].repeat(1, 3, 1, 1)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    return nn.functional.interpolate(images, size=16)[order], torch.tensor(found.target)[order]


def train(images: Tensor, labels: Tensor, steps: int) -> tuple[Dinov2Model, nn.Linear]:
    """Train an encoder and a head on its class token."""
    torch.manual_seed(0)
    encoder = Dinov2Model(Dinov2Config(**NETWORK))
    head = nn.Linear(NETWORK["hidden_size"], 10)
    optimizer = torch.optim.AdamW([*encoder.parameters(), *head.parameters()], 1e-3, weight_decay=0.05)
    for _ in range(steps):
        chosen = torch.randint(0, len(images), (BATCH,))
        optimizer.zero_grad()
        loss_of(encoder, head, images[chosen], labels[chosen]).backward()
        optimizer.step()
    return encoder.eval(), head


def loss_of(encoder: nn.Module, head: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    """Return the loss that an encoder and its head are trained by."""
    return nn.functional.cross_entropy(head(encoder(images).pooler_output), labels, label_smoothing=0.1)


@torch.no_grad()
def measure(encoder: nn.Module, dense: nn.Module, head: nn.Module, images: Tensor, labels: Tensor) -> list[str]:
    """Return the figures of an encoder as cells of the table."""
    found, wanted = encoder(images), dense(images)
    cosine = nn.functional.cosine_similarity
    pooled = cosine(found.pooler_output, wanted.pooler_output).mean()
    tokens = cosine(found.last_hidden_state, wanted.last_hidden_state, dim=-1).mean()
    near = (find_by_neighbours(found.pooler_output, labels) == labels).float().mean()
    top1 = (head(found.pooler_output).argmax(1) == labels).float().mean()
    return [f"{pooled:.4f}", f"{tokens:.4f}", f"{100 * near:.1f}", f"{100 * top1:.1f}"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    args = add_arguments(parser, steps=400, shares=[50, 25], epochs=20).parse_args()
    images, labels = read_digits()
    dense, head = train(images[:TRAINED], labels[:TRAINED], args.steps)
    batches, truths = (list(part[:CALIBRATION].split(BATCH)) for part in (images, labels))
    peers = partial(
        peer_cuts,
        dense,
        batches,
        [
            partial(loss_of, head=head, images=some, labels=classes)
            for some, classes in zip(batches, truths, strict=True)
        ],
        is_kept=lambda name: name.endswith(KEPT),
        output=lambda network, images: network(images).pooler_output.sum(),
    )
    held_out = images[TRAINED:], labels[TRAINED:]
    titles = ["cosine", "cosine of positions", "k-NN %", "head %"]
    print_cuts(dense, batches, titles, lambda network: measure(network, dense, head, *held_out), peers, args)


if __name__ == "__main__":
    main()
