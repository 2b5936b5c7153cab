"""Saved image processors reproduce the pixels of timm and torchvision exactly."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
import torchvision
from helpers.bases import difference, largest_difference, odd_images, save_timm, tiny
from PIL import Image
from transformers import (
    AutoImageProcessor,
)

from isoprune_hf.checkpoint.folder import save_model_folder
from isoprune_hf.checkpoint.modeling_isoprune import IsoImageProcessor
from isoprune_hf.errors import UnsupportedArchitectureError
from isoprune_hf.models import load_base
from isoprune_hf.models.processors import torchvision_processor

TINY_WIDTHS = {"embed_dim": 32, "depth": 1, "num_heads": 2}


@pytest.mark.parametrize(
    ("name", "args", "crop_pct", "interpolation"),
    [
        ("deit_small_distilled_patch16_224.fb_in1k", TINY_WIDTHS, 0.9, "bicubic"),
        pytest.param(
            "vit_base_patch16_224.augreg2_in21k_ft_in1k", TINY_WIDTHS, 0.9, "bicubic", marks=pytest.mark.families
        ),
        ("swin_tiny_patch4_window7_224.ms_in1k", {"embed_dim": 24, "depths": [1], "num_heads": [2]}, 0.9, "bicubic"),
        pytest.param(
            "convnext_tiny.fb_in1k", {"depths": [1] * 4, "dims": [8] * 4}, 0.875, "bicubic", marks=pytest.mark.families
        ),
        pytest.param(
            "resnet50.a1_in1k", {"layers": [1] * 4, "channels": [8] * 4}, 0.95, "bicubic", marks=pytest.mark.families
        ),
        ("resnet50.tv_in1k", {"layers": [1] * 4, "channels": [8] * 4}, 0.875, "bilinear"),
        ("deit3_small_patch16_384.fb_in1k", TINY_WIDTHS, 1.0, "bicubic"),
    ],
)
def test_timm_processor_reproduces_the_pixels_of_timm(
    name: str, args: dict[str, Any], crop_pct: float, interpolation: str, tmp_path: Path
) -> None:
    data = timm.data.resolve_data_config(timm.get_pretrained_cfg(name).to_dict())
    assert (data["crop_pct"], data["interpolation"]) == (crop_pct, interpolation)
    base = load_base(f"timm/{name}", pretrained=False, model_args=args, num_labels=2)
    assert base.model.config.image_size == list(data["input_size"])
    save_model_folder(tmp_path, base.model, base.processor)
    processor = AutoImageProcessor.from_pretrained(tmp_path)
    assert type(processor) is IsoImageProcessor
    assert largest_difference(processor, timm.data.create_transform(**data, is_training=False)) == 0.0


@pytest.mark.parametrize("name", ["mobilenet_v2", "mobilenet_v2.IMAGENET1K_V1"])
def test_torchvision_processor_reproduces_the_pixels_of_torchvision(name: str, tmp_path: Path) -> None:
    base = load_base(f"torchvision/{name}", pretrained=False, model_args={"width_mult": 0.25})
    save_model_folder(tmp_path, base.model, base.processor)
    choices = torchvision.models.get_model_weights(name.partition(".")[0])
    transform = (choices[name.partition(".")[2]] if "." in name else choices.DEFAULT).transforms()
    assert largest_difference(AutoImageProcessor.from_pretrained(tmp_path), transform) == 0.0


def test_bicubic_torchvision_preset_is_reproduced_exactly() -> None:
    transform = torchvision.models.Swin_T_Weights.DEFAULT.transforms()
    assert transform.interpolation.value == "bicubic"
    assert largest_difference(torchvision_processor(transform), transform) == 0.0


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_transparency_is_dropped_as_in_timm(mode: str) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (40, 30, 4), dtype=np.uint8)
    image = Image.fromarray(pixels, "RGBA").convert(mode)
    if mode == "P":
        image.info["transparency"] = image.getpixel((0, 0))
    base = tiny()
    data = timm.data.resolve_data_config(timm.get_pretrained_cfg("vit_tiny_patch16_224").to_dict())
    transform = timm.data.create_transform(**{**data, "input_size": (3, 16, 16), "crop_pct": 1.0}, is_training=False)
    assert difference(base.processor, transform, image) == 0.0


def test_batch_has_the_pixels_of_its_images() -> None:
    processor = tiny().processor
    images = [image.convert("RGB") for image in odd_images()]
    batch = processor(images, return_tensors="pt").pixel_values
    single = torch.cat([processor(image, return_tensors="pt").pixel_values for image in images])
    assert torch.equal(batch, single)


def test_untrained_image_size_uses_whole_image() -> None:
    base = tiny()
    assert base.model.config.image_size == [3, 16, 16]
    data = timm.data.resolve_data_config(timm.get_pretrained_cfg("vit_tiny_patch16_224").to_dict())
    transform = timm.data.create_transform(**{**data, "input_size": (3, 16, 16), "crop_pct": 1.0}, is_training=False)
    assert largest_difference(base.processor, transform) == 0.0


def test_transform_with_border_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedArchitectureError, match=r"^[^\n]*crop mode 'border'[^\n]*$"):
        load_base(str(save_timm(tmp_path, crop_mode="border")))
