"""Scores worked out the long way, to compare with: one image after the other, one channel after the other."""

from collections.abc import Iterator, Mapping

import torch
from helpers.tiny_models import make_images
from torch import nn

Batches = list[tuple[torch.Tensor, torch.Tensor]]
Values = Mapping[str, torch.Tensor]


def batches_of(model: nn.Module, sizes: list[int], seed: int = 3) -> Batches:
    """Draw micro-batches of these sizes, with labels from 0 to 6."""
    images = make_images(model, sum(sizes), seed)
    labels = torch.arange(sum(sizes)) % 7
    return list(zip(images.split(sizes), labels.split(sizes), strict=True))


def gradients_of_images(model: nn.Module, batches: Batches) -> Iterator[dict[str, torch.Tensor]]:
    """Give the gradients of one image after the other; zero where there is none."""
    model.eval()
    parameters = dict(model.model.named_parameters())
    for images, labels in batches:
        for image, label in zip(images, labels, strict=True):
            model.zero_grad()
            nn.functional.cross_entropy(model(pixel_values=image[None]).logits, label[None]).backward()
            yield {name: torch.zeros_like(p) if p.grad is None else p.grad.clone() for name, p in parameters.items()}
    model.zero_grad()


def channel_scores(group, values: Values, norm: str = "sum", reduction: str = "sum") -> torch.Tensor:
    """Put elements together channel by channel; `norm` as in `channel_scores.py`."""
    scores = []
    for channel in range(group.channels):
        parts = []
        for member in group.members:
            if member.parameter in values:
                found = values[member.parameter].double().movedim(member.dim, 0)[member.index[channel]]
                if norm == "sum":
                    parts.append(found.abs().sum())
                else:
                    parts.append(found.norm() if norm == "member" else found.norm() ** 2)
        score = torch.stack(parts).sum() if reduction == "sum" else torch.stack(parts).mean()
        scores.append(score.sqrt() if norm == "channel" else score)
    return torch.stack(scores).float()


def assert_near(found: torch.Tensor, expected: torch.Tensor, tolerance: float, floor: float, what: str) -> None:
    """Compare by the root of the mean square, relative to what is expected; `floor` is what rounding alone makes."""
    difference, size = ((values.double() ** 2).mean().sqrt() for values in (found - expected, expected))
    assert difference <= tolerance * size + floor, f"{what}: {difference / (size + floor):.1e}"
