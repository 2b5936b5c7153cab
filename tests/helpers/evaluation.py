"""A small network, images for it, and the calibration error counted image by image."""

from types import SimpleNamespace

import datasets
import numpy as np
import torch
from PIL import Image
from torch import nn

from isoprune_hf.checkpoint.modeling_isoprune import IsoImageProcessor


class TinyNet(nn.Module):
    def __init__(self, classes: int = 7):
        super().__init__()
        self.norm = nn.BatchNorm2d(3)
        self.dropout = nn.Dropout(0.5)
        self.head = nn.Linear(48, classes)

    def forward(self, pixel_values: torch.Tensor) -> SimpleNamespace:
        return SimpleNamespace(logits=self.head(self.dropout(self.norm(pixel_values)).flatten(1)))


def make_net(classes: int = 7) -> TinyNet:
    torch.manual_seed(0)
    return TinyNet(classes)


def make_processor() -> IsoImageProcessor:
    return IsoImageProcessor(size={"height": 4, "width": 4}, do_center_crop=False)


def make_split(images: int, classes: int = 7) -> datasets.Dataset:
    rng = np.random.default_rng(3)
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(num_classes=classes)})
    pixels = [Image.fromarray(rng.integers(0, 256, (4, 4, 3), dtype=np.uint8)) for _ in range(images)]
    labels = rng.integers(0, classes, images).tolist()
    return datasets.Dataset.from_dict({"image": pixels, "label": labels}, features=features)


def calibration_error_by_hand(confidences: list[float], hits: list[bool]) -> float:
    """Sort the images into 15 bins one by one, and compare the two means of each."""
    bins: dict[int, list[tuple[float, bool]]] = {}
    for confidence, hit in zip(confidences, hits, strict=True):
        number = next(m for m in range(1, 16) if confidence <= m / 15 or m == 15)
        bins.setdefault(number, []).append((confidence, hit))
    gaps = [
        len(items) * abs(sum(hit for _, hit in items) / len(items) - sum(c for c, _ in items) / len(items))
        for items in bins.values()
    ]
    return sum(gaps) / len(hits)


def numbers_of(figures: dict) -> dict[str, float]:
    """Return figures of an evaluation without the images that they were measured on."""
    return {name: value for name, value in figures.items() if name not in ("data", "split")}
