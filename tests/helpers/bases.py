"""Bases in folders of every library, and comparisons of weights, logits and pixels."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from helpers.tiny_models import SWIN, VIT
from PIL import Image
from safetensors.torch import save_file
from torch import nn
from transformers import (
    ConvNextForImageClassification,
    DeiTForImageClassificationWithTeacher,
    ResNetForImageClassification,
    SwinForImageClassification,
    TimmWrapperConfig,
    TimmWrapperForImageClassification,
    ViTForImageClassification,
)

from isoprune_hf.errors import IsoPruneError, RecipeError
from isoprune_hf.models import BaseModel, load_base

TINY = "timm/vit_tiny_patch16_224"


CLASSES = {
    "hf-vit": ViTForImageClassification,
    "hf-deit": DeiTForImageClassificationWithTeacher,
    "hf-swin": SwinForImageClassification,
    "hf-convnext": ConvNextForImageClassification,
    "hf-resnet": ResNetForImageClassification,
}


def tiny(**options: Any) -> BaseModel:
    return load_base(options.pop("name", TINY), pretrained=False, model_args=VIT, **options)


def weights(model: nn.Module) -> dict[str, torch.Tensor]:
    return dict(model.named_parameters()) | dict(model.named_buffers())


def assert_same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> None:
    assert first.keys() == second.keys()
    assert [name for name in first if not torch.equal(first[name], second[name])] == []


def seeded_images(base: BaseModel) -> torch.Tensor:
    return torch.randn(2, *base.model.config.image_size, generator=torch.Generator().manual_seed(1))


def output_of(model: nn.Module, images: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        output = model(images)
    return output if isinstance(output, torch.Tensor) else output.logits


PIXELS = {"mean": (0.1, 0.2, 0.3), "std": (0.4, 0.5, 0.6), "crop_pct": 0.8, "interpolation": "bilinear"}


def save_timm(folder: Path, **pixels: Any) -> Path:
    """Write a folder as timm reads it."""
    torch.manual_seed(8)
    model = timm.create_model("vit_tiny_patch16_224", num_classes=4, **VIT)
    path = folder / "timm-folder"
    path.mkdir()
    save_file(model.state_dict(), path / "model.safetensors")
    config = {"architecture": "vit_tiny_patch16_224", "num_classes": 4, "label_names": ["ant", "bee", "cat", "dog"]}
    config |= {"model_args": VIT, "pretrained_cfg": {"input_size": (3, 16, 16), "num_classes": 4, **PIXELS, **pixels}}
    (path / "config.json").write_text(json.dumps(config))
    return path


WRAPPED = [
    ("vit_tiny_patch16_224", VIT),
    ("swin_tiny_patch4_window7_224", SWIN),  # index tables and masks that are not in the file
    ("resnet10t", {}),
]


def save_wrapped(folder: Path, name: str, args: dict[str, Any], **entries: Any) -> TimmWrapperForImageClassification:
    """Write a folder as transformers writes a timm model."""
    torch.manual_seed(3)
    labels = {0: "ant", 1: "bee", 2: "cat", 3: "dog"}
    model = TimmWrapperForImageClassification(
        TimmWrapperConfig(architecture=name, model_args=args, id2label=labels, num_labels=4, **entries)
    )
    model.save_pretrained(folder)
    return TimmWrapperForImageClassification.from_pretrained(folder)


def put_in_cache(cache: Path, repo: str, folder: Path) -> None:
    """Copy a folder into the cache of the Hub, as a download does."""
    root, revision = cache / f"models--{repo.replace('/', '--')}", "0" * 40
    (root / "refs").mkdir(parents=True)
    (root / "refs" / "main").write_text(revision)
    (root / "snapshots" / revision).mkdir(parents=True)
    for file in folder.iterdir():
        (root / "snapshots" / revision / file.name).write_bytes(file.read_bytes())


def copy_of(source: Path, target: Path) -> Path:
    folder = target / "copied"
    folder.mkdir()
    for file in source.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    return folder


def odd_images() -> Iterator[Image.Image]:
    """Yield noise and waves: odd and even sides, both orientations, smaller than any crop, other modes."""
    rng = np.random.default_rng(0)
    sizes = [(37, 51), (51, 37), (223, 225), (225, 223), (224, 224), (481, 337), (375, 500), (333, 250)]
    sizes += [(7, 30), (300, 41), (260, 256), (247, 301), (1, 1)]
    modes = ["RGB"] * 7 + ["L", "RGBA", "P", "1", "LA", "CMYK"]  # all opaque
    for index, ((width, height), mode) in enumerate(zip(sizes, modes, strict=True)):
        noise = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
        rows, columns = np.mgrid[:height, :width]
        waves = np.stack([127 + 120 * np.sin(rows / k + columns / (k + 3)) for k in (5, 9, 17)], axis=-1)
        pixels = noise if index % 2 else waves.astype(np.uint8)
        yield Image.fromarray(pixels).convert(mode)
    for number in range(7):  # sides of every remainder, whose crop starts on a half row or a half column
        pixels = rng.integers(0, 256, (240 + number, 301 - 5 * number, 3), dtype=np.uint8)
        yield Image.fromarray(pixels)


def largest_difference(processor: Any, transform: Callable[[Image.Image], torch.Tensor]) -> float:
    """Return the largest difference of normalised pixels; timm and torchvision read every file as RGB first."""
    return max(difference(processor, transform, image) for image in odd_images())


def difference(processor: Any, transform: Callable[[Image.Image], torch.Tensor], image: Image.Image) -> float:
    pixels = processor(image, return_tensors="pt").pixel_values[0]
    return (pixels - transform(image.convert("RGB"))).abs().max().item()


def refused(name: Any, error: type[IsoPruneError] = RecipeError, **options: Any) -> str:
    """Return the message with which `load_base` refuses a name; it must be one line."""
    with pytest.raises(error) as caught:
        load_base(name, **options)
    message = str(caught.value)
    assert "\n" not in message
    return message
