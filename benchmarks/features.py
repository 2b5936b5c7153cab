"""Prune an encoder for its features: how near they stay to those of the base, before and after repair and finetuning.

    python benchmarks/features.py [--shares 50 25] [--steps 400] [--epochs 20]

A small Dinov2 is trained with a head on 1,347 of the handwritten digits of scikit-learn; the encoder alone is pruned,
on 512 of them without their labels, and measured on the other 450 images. `head` is the accuracy of the head that was
trained with the dense encoder, on the features of the pruned one. Prints a table in Markdown.
"""

import argparse
from typing import Any

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from transformers import Dinov2Config, Dinov2Model

import isoprune_hf
from isoprune_hf.evaluation.features import find_by_neighbours

TRAINED, CALIBRATION, BATCH = 1347, 512, 64
NETWORK = {"image_size": 16, "patch_size": 4, "hidden_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4}
WAYS: dict[str, dict[str, Any]] = {
    "scores of weights (l1)": {"criterion": "l1", "reconstruct": "none", "rotate": False},
    "default, without repair": {"reconstruct": "none", "rotate": False},
    "default": {},
}


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
        logits = head(encoder(images[chosen]).pooler_output)
        optimizer.zero_grad()
        nn.functional.cross_entropy(logits, labels[chosen], label_smoothing=0.1).backward()
        optimizer.step()
    return encoder.eval(), head


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
    parser.add_argument("--shares", type=int, nargs="+", default=[50, 25], help="per cent of the MACs")
    parser.add_argument("--steps", type=int, default=400, help="updates of the base")
    parser.add_argument("--epochs", type=int, default=20, help="passes of the finetuning")
    args = parser.parse_args()
    images, labels = read_digits()
    dense, head = train(images[:TRAINED], labels[:TRAINED], args.steps)
    held_out = images[TRAINED:], labels[TRAINED:]
    batches = list(images[:CALIBRATION].split(BATCH))
    print("| MACs | way | cosine | cosine of positions | k-NN % | head % |")
    print("|---:|---|---:|---:|---:|---:|")
    print(f"| 100 % | base | {' | '.join(measure(dense, dense, head, *held_out))} |")
    for share in args.shares:
        for name, settings in WAYS.items():
            pruned = isoprune_hf.prune(dense, batches, target_macs=f"{share}%", round_to=1, **settings)
            left = f"{100 * pruned.pruned_cost.macs / pruned.base_cost.macs:.0f} %"
            print(f"| {left} | {name} | {' | '.join(measure(pruned.model, dense, head, *held_out))} |", flush=True)
        recipe = isoprune_hf.FinetuneRecipe(epochs=args.epochs, learning_rate=3e-4)
        isoprune_hf.finetune(pruned, batches, recipe=recipe)
        figures = measure(pruned.model, dense, head, *held_out)
        print(f"| {left} | default, finetuned without labels | {' | '.join(figures)} |", flush=True)


if __name__ == "__main__":
    main()
