"""A small network, images and recipes that train in milliseconds."""

from types import SimpleNamespace
from typing import Any

import datasets
import numpy as np
import torch
from accelerate import Accelerator
from PIL import Image
from torch import nn

from isoprune_hf.checkpoint.modeling_isoprune import IsoImageProcessor
from isoprune_hf.data.dataset import ImageData
from isoprune_hf.recipes import FinetuneRecipe
from isoprune_hf.training.finetune import finetune

ACCELERATOR = Accelerator(cpu=True)


class TinyNet(nn.Module):
    def __init__(self, width: int = 8, dropout: float = 0.0):
        super().__init__()
        self.stem = nn.Linear(48, width)
        self.norm = nn.LayerNorm(width)
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(width, 3)

    def forward(self, pixel_values: torch.Tensor) -> SimpleNamespace:
        return SimpleNamespace(logits=self.head(self.dropout(self.norm(self.stem(pixel_values.flatten(1))).tanh())))


def make_net(seed: int = 0, **changes: Any) -> TinyNet:
    torch.manual_seed(seed)
    return TinyNet(**changes)


def make_processor(side: int = 4) -> IsoImageProcessor:
    return IsoImageProcessor(size={"height": side, "width": side}, do_center_crop=False)


def make_data(train: int = 70, evaluation: int = 9, side: int = 4) -> ImageData:
    rng = np.random.default_rng(0)
    names = ("cat", "dog", "owl")
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=list(names))})

    def make_split(images: int) -> datasets.Dataset | None:
        pixels = [Image.fromarray(rng.integers(0, 256, (side, side, 3), dtype=np.uint8)) for _ in range(images)]
        columns = {"image": pixels, "label": rng.integers(0, 3, images).tolist()}
        return datasets.Dataset.from_dict(columns, features=features) if images else None

    return ImageData(make_split(train), make_split(evaluation), names, "random", "0")


def make_recipe(**changes: Any) -> FinetuneRecipe:
    plain = {"epochs": 2, "batch_size": 32, "optimizer": "sgd", "learning_rate": 0.1}
    return FinetuneRecipe(**{**plain, "crop_scale": (0.5, 1.0), "clip_grad": 1.0, **changes})


def train(net: nn.Module, recipe: FinetuneRecipe, accelerator: Accelerator = ACCELERATOR, **options: Any) -> dict:
    data = options.pop("data", None) or make_data()
    return finetune(net, data, make_processor(), recipe, accelerator=accelerator, **options)


def assert_equal_weights(first: nn.Module, second: nn.Module, atol: float) -> None:
    torch.testing.assert_close(dict(first.state_dict()), dict(second.state_dict()), atol=atol, rtol=0)


def make_normed(seed: int = 0) -> TinyNet:
    net = make_net(seed, dropout=0.3)
    net.norm = nn.BatchNorm1d(8)
    return net


def make_replica_recipe() -> FinetuneRecipe:
    """Return a recipe of two epochs; the last update of each has half as many images as the others."""
    mixing = {"mixup": 0.5, "cutmix": 1.0, "mixup_pairing": "roll", "repeated_augmentation": 2}
    return make_recipe(batch_size=16, virtual_replicas=4, drop_last=False, distillation="none", **mixing)
