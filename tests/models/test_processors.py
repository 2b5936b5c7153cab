"""Changed evaluation transforms equal those of torchvision on PIL images."""

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import CenterCrop, Compose, InterpolationMode, Normalize, Resize, ToTensor
from transformers import BaseImageProcessor, ConvNextImageProcessor, ViTImageProcessor

from isoprune_hf.checkpoint.modeling_isoprune import IsoImageProcessor
from isoprune_hf.errors import RecipeError
from isoprune_hf.models.processors import with_transform

MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.3, 0.4)
NORMAL = {"image_mean": list(MEAN), "image_std": list(STD)}


def picture() -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (53, 71, 3), dtype=np.uint8))


def pixels(processor: BaseImageProcessor) -> torch.Tensor:
    return processor(picture(), return_tensors="pt").pixel_values[0]


def by_torchvision(resize: int, interpolation: str, crop: int = 32) -> torch.Tensor:
    steps = [Resize(resize, InterpolationMode(interpolation)), CenterCrop(crop), ToTensor(), Normalize(MEAN, STD)]
    return Compose(steps)(picture())


def ours() -> IsoImageProcessor:
    return IsoImageProcessor(size={"shortest_edge": 36}, crop_size={"height": 32, "width": 32}, resample=3, **NORMAL)


THEIRS = {
    "squares": lambda: ViTImageProcessor(size={"height": 32, "width": 32}, **NORMAL),
    "crop_pct": lambda: ConvNextImageProcessor(size={"shortest_edge": 32}, crop_pct=0.8, **NORMAL),
    "ours": ours,
}


@pytest.mark.parametrize("interpolation", ["nearest", "bilinear", "bicubic"])
@pytest.mark.parametrize("kind", THEIRS)
def test_resize_and_interpolation_match_torchvision(kind: str, interpolation: str) -> None:
    asked = with_transform(THEIRS[kind](), resize=40, interpolation=interpolation)
    assert torch.allclose(pixels(asked), by_torchvision(40, interpolation), atol=1e-6)


@pytest.mark.parametrize("kind", THEIRS)
def test_interpolation_changes_nothing_else(kind: str) -> None:
    processor = THEIRS[kind]()
    before, resample = pixels(processor), processor.resample
    asked = with_transform(processor, interpolation="nearest")
    assert type(asked) is type(processor) and asked.resample == Image.Resampling.NEAREST
    assert pixels(asked).shape == before.shape and not torch.equal(pixels(asked), before)
    assert torch.equal(pixels(processor), before) and processor.resample == resample


def test_new_interpolation_keeps_the_resize() -> None:
    assert torch.allclose(pixels(with_transform(ours(), interpolation="bilinear")), by_torchvision(36, "bilinear"))


def test_unchanged_transform_returns_the_same_processor() -> None:
    processor = ours()
    assert with_transform(processor) is processor
    assert with_transform(processor, resize=36, interpolation="bicubic") is processor
    assert with_transform(processor, resize=37) is not processor


def test_saved_processor_keeps_the_changed_transform(tmp_path) -> None:
    asked = with_transform(ours(), resize=40, interpolation="bilinear")
    asked.save_pretrained(tmp_path)
    again = IsoImageProcessor.from_pretrained(tmp_path)
    assert with_transform(again, resize=40, interpolation="bilinear") is again
    assert torch.equal(pixels(again), pixels(asked))


def test_resize_below_the_crop_is_refused() -> None:
    with pytest.raises(RecipeError, match=r"data\.resize .* 32 .* 31$"):
        with_transform(ours(), resize=31)
    assert pixels(with_transform(ours(), resize=32)).shape == (3, 32, 32)


def test_mean_and_std_replace_those_of_the_model() -> None:
    processor = ours()
    plain = pixels(with_transform(processor, mean=[0.0] * 3, std=[1.0] * 3))
    asked = pixels(with_transform(processor, mean=[0.5, 0.25, 0.0], std=[0.5, 0.25, 1.0]))
    expected = (plain - torch.tensor([0.5, 0.25, 0.0])[:, None, None]) / torch.tensor([0.5, 0.25, 1.0])[:, None, None]
    assert torch.allclose(asked, expected, atol=1e-6)
    assert with_transform(processor, mean=list(processor.image_mean)) is processor


def test_mean_of_other_channels_is_refused() -> None:
    with pytest.raises(RecipeError, match=r"data\.mean"):
        with_transform(ours(), mean=[0.5])
