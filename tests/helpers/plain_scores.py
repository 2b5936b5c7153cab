"""Reference scores, computed image by image and channel by channel."""

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
    """Yield the gradients of each image; zero for parameters without a gradient."""
    model.eval()
    parameters = dict(model.model.named_parameters())
    for images, labels in batches:
        for image, label in zip(images, labels, strict=True):
            model.zero_grad()
            nn.functional.cross_entropy(model(pixel_values=image[None]).logits, label[None]).backward()
            yield {name: torch.zeros_like(p) if p.grad is None else p.grad.clone() for name, p in parameters.items()}
    model.zero_grad()


def channel_scores(group, values: Values, norm: str = "sum", reduction: str = "sum") -> torch.Tensor:
    """Reduce elements to channel scores, channel by channel; `norm` as in `reduction.py`."""
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
    """Assert a small root mean square difference, relative to the expected values; `floor` is the rounding error."""
    difference, size = ((values.double() ** 2).mean().sqrt() for values in (found - expected, expected))
    assert difference <= tolerance * size + floor, f"{what}: {difference / (size + floor):.1e}"
