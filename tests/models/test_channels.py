"""Bases of other than three channels: mean and std as in timm, and processors that read these channels."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from helpers.bases import VIT, put_in_cache, refused
from helpers.images import noise
from safetensors.torch import save_file
from timm.data import resolve_input_data_config
from timm.data.loader import adapt_to_chs
from timm.models import save_for_hf
from transformers import (
    BitImageProcessor,
    ConvNextImageProcessor,
    EfficientNetImageProcessor,
    LevitImageProcessor,
    MobileViTImageProcessor,
    PoolFormerImageProcessor,
    ResNetConfig,
    SiglipConfig,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessor,
)

from isoprune_hf.checkpoint.folder import save_model_folder
from isoprune_hf.checkpoint.image_processor import IsoImageProcessor, channels_of
from isoprune_hf.errors import RecipeError
from isoprune_hf.models import load_base
from isoprune_hf.models.channels import fit_channels, fit_values
from isoprune_hf.models.processors import transformers_image_size

SMALL_VIT = {"image_size": 16, "patch_size": 4, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4}


@pytest.mark.parametrize("channels", [1, 2, 3, 4, 6])
@pytest.mark.parametrize("values", [(0.485, 0.456, 0.406), (0.229, 0.224, 0.225), (0.5,), 0.25])
def test_values_equal_those_of_the_loader_of_timm(values: Any, channels: int) -> None:
    assert tuple(fit_values(values, channels)) == tuple(adapt_to_chs(values, channels))


@pytest.mark.parametrize("channels", [1, 4, 6])
def test_timm_argument_sets_channels_mean_and_std(channels: int) -> None:
    args = {**VIT, "in_chans": channels}
    base = load_base("timm/vit_tiny_patch16_224", pretrained=False, model_args=args)
    expected = resolve_input_data_config(timm.create_model("vit_tiny_patch16_224", **args))
    assert base.model.config.image_size == [channels, 16, 16] and base.model.config.base["args"] == args
    assert tuple(base.processor.image_mean) == expected["mean"] and tuple(base.processor.image_std) == expected["std"]
    assert base.model(torch.zeros(1, channels, 16, 16)).logits.shape == (1, 1000)


def test_trained_timm_weights_are_adapted_by_timm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = timm.create_model("resnet10t")
    (tmp_path / "saved").mkdir()
    save_file(model.state_dict(), tmp_path / "saved" / "model.safetensors")
    put_in_cache(tmp_path / "cache", "timm/resnet10t.c3_in1k", tmp_path / "saved")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    base = load_base("timm/resnet10t.c3_in1k", model_args={"in_chans": 1})
    images = torch.randn(2, 1, 64, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = model.eval()(images.expand(-1, 3, -1, -1))
        torch.testing.assert_close(base.model(images).logits, expected, rtol=1e-4, atol=1e-4)
    assert base.processor.image_mean == (0.449,)
    assert "pretrained" in refused("timm/resnet10t.c3_in1k", model_args={"in_chans": 1, "stem_width": 8})


@pytest.mark.parametrize("noted", [True, False])
def test_saved_timm_model_keeps_its_channels(noted: bool, tmp_path: Path) -> None:
    overlay = {"input_size": (1, 32, 32), "mean": (0.1,), "std": (0.3,)}
    model = timm.create_model("resnet10t", in_chans=1, num_classes=3, pretrained_cfg_overlay=overlay).eval()
    save_for_hf(model, tmp_path / "timm", model_args={"in_chans": 1} if noted else None, safe_serialization=True)
    base = load_base(str(tmp_path / "timm"))
    assert base.model.config.image_size == [1, 32, 32] and base.processor.image_mean == (0.1,)
    images = torch.randn(2, 1, 32, 32)
    save_model_folder(tmp_path / "ours", base.model, base.processor)
    again = load_base(str(tmp_path / "ours"))
    with torch.no_grad():
        assert torch.equal(again.model(images).logits, model(images))


@pytest.mark.parametrize("saved", [None, [0.3], [0.2, 0.3, 0.4]])
def test_transformers_model_reads_grey_images(saved: list[float] | None, tmp_path: Path) -> None:
    config = ViTConfig(num_channels=1, intermediate_size=64, num_labels=3, **SMALL_VIT)
    ViTForImageClassification(config).save_pretrained(tmp_path)
    if saved:
        size = {"height": 16, "width": 16}
        ViTImageProcessor(size=size, image_mean=saved, image_std=saved).save_pretrained(tmp_path)
    base = load_base(str(tmp_path))
    assert base.model.config.image_size == [1, 16, 16] and type(base.processor) is IsoImageProcessor
    assert base.processor.image_mean == pytest.approx([0.3 if saved else 0.5])
    assert base.processor(noise(), return_tensors="pt").pixel_values.shape == (1, 1, 16, 16)


COMMON = {
    "squares": ViTImageProcessor(size={"height": 32, "width": 24}),
    "edge": BitImageProcessor(size={"shortest_edge": 40}, crop_size={"height": 32, "width": 32}),
    "share": ConvNextImageProcessor(size={"shortest_edge": 32}, crop_pct=0.8),
    "whole": ConvNextImageProcessor(size={"shortest_edge": 384}),
    "levit": LevitImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}),
    "poolformer": PoolFormerImageProcessor(size={"shortest_edge": 36}, crop_size={"height": 36, "width": 36}),
    "bgr": MobileViTImageProcessor(size={"shortest_edge": 36}, crop_size={"height": 32, "width": 32}),
}


@pytest.mark.parametrize("name", COMMON)
def test_common_transforms_are_kept_for_other_channels(name: str) -> None:
    stock = COMMON[name]
    fitted = fit_channels(stock, 6)
    assert type(fitted) is IsoImageProcessor and channels_of(fitted) == 6 and channels_of(stock) == 3
    image = np.asarray(noise((12, 9)).resize((96, 72), 3))
    made = fitted(np.concatenate([image, image], axis=2), return_tensors="pt").pixel_values[0]
    expected = stock(noise((12, 9)).resize((96, 72), 3), return_tensors="pt", do_normalize=False).pixel_values[0]
    mean, std = (np.mean(getattr(stock, name) or [default]) for name, default in (("image_mean", 0), ("image_std", 1)))
    expected = (expected - mean) / std if stock.do_normalize else expected
    expected = expected.flip(0) if name == "bgr" else expected  # as mobilevit orders colours
    assert made.shape == (6, *expected.shape[1:])
    assert (made - torch.cat([expected, expected])).abs().mean() * std < 4 / 255
    assert torch.equal(made[:3], made[3:])


def test_other_transforms_keep_their_processor() -> None:
    stock = EfficientNetImageProcessor(size={"height": 32, "width": 32}, rescale_factor=1 / 127.5, rescale_offset=True)
    fitted = fit_channels(stock, 1)
    assert type(fitted) is EfficientNetImageProcessor and fitted.image_mean == (0.5,)
    grey = noise(mode="L")
    expected = stock(grey.convert("RGB"), return_tensors="pt").pixel_values[0, :1]
    assert torch.equal(fitted(grey, return_tensors="pt").pixel_values[0], expected)


def test_vision_tower_names_the_channels() -> None:
    config = SiglipConfig(vision_config={"num_channels": 4, "image_size": 32})
    assert transformers_image_size(config, ViTImageProcessor()) == [4, 32, 32]


@pytest.mark.parametrize("channels", [0, -1, "x", 2.5, None])
def test_damaged_number_of_channels_is_refused(channels: Any) -> None:
    config = ResNetConfig()
    vars(config)["num_channels"] = channels
    with pytest.raises(RecipeError, match="num_channels"):
        transformers_image_size(config, ViTImageProcessor())
