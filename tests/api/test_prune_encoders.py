"""Encoders of other classes than those of AutoModel are pruned, and come back with the same outputs by name."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers
from helpers.marks import one_of_each
from torch import nn
from transformers import AutoModel

from isoprune_hf import IsoPruneBackbone, prune
from isoprune_hf.errors import UnsupportedArchitectureError

TOWER = {
    "image_size": 16,
    "patch_size": 4,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
}
SWIN = {"image_size": 16, "patch_size": 2, "embed_dim": 16, "depths": [1, 1], "num_heads": [2, 4], "window_size": 4}
STAGES = {"hidden_sizes": [16, 24, 32, 40], "depths": [1, 1, 1, 1]}
CUT = {"target_macs": "70%", "round_to": 1, "criterion": "l1"}
ENCODERS: dict[str, tuple[Callable[[], nn.Module], set[str]]] = {
    "ViT without pooler": (
        lambda: transformers.ViTModel(transformers.ViTConfig(**TOWER), add_pooling_layer=False),
        {"last_hidden_state"},
    ),
    "Swin without pooler": (
        lambda: transformers.SwinModel(transformers.SwinConfig(**SWIN), add_pooling_layer=False),
        {"last_hidden_state"},
    ),
    "CLIP with projection": (
        lambda: transformers.CLIPVisionModelWithProjection(transformers.CLIPVisionConfig(**TOWER, projection_dim=24)),
        {"image_embeds", "last_hidden_state"},
    ),
    "MetaClip2": (
        lambda: transformers.MetaClip2VisionModel(transformers.MetaClip2VisionConfig(**TOWER)),
        {"last_hidden_state", "pooler_output"},
    ),
    "DINOv3 ConvNeXt": (
        lambda: transformers.DINOv3ConvNextModel(transformers.DINOv3ConvNextConfig(**STAGES, image_size=32)),
        {"last_hidden_state", "pooler_output"},
    ),
}
DEFAULT = ("ViT without pooler", "CLIP with projection", "DINOv3 ConvNeXt")


@pytest.mark.parametrize("name", one_of_each(ENCODERS, *DEFAULT))
def test_outputs_of_the_class_come_back(name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    make, names = ENCODERS[name]
    encoder = make().eval()
    side = 32 if "ConvNeXt" in name else 16
    images = torch.randn(2, 3, side, side, generator=torch.Generator().manual_seed(1))
    pruned = prune(encoder, [images], **CUT, rotate=False, reconstruct="none")
    pruned.save(tmp_path / "folder")
    again, info = AutoModel.from_pretrained(tmp_path / "folder", output_loading_info=True)
    with torch.no_grad():
        dense, cut, reopened = encoder(images), pruned.model(images), again.eval()(images)
    assert not any(info.values()) and {*cut} == {*reopened} == {*dense} == names
    assert all(torch.equal(value, reopened[key]) and value.shape == dense[key].shape for key, value in cut.items())


def test_backbone_keeps_its_feature_maps(tmp_path: Path) -> None:
    torch.manual_seed(0)
    backbone = transformers.Dinov2Backbone(transformers.Dinov2Config(**TOWER, out_indices=[1, 2])).eval()
    with torch.no_grad():
        backbone.layernorm.weight.mul_(torch.linspace(0.5, 2, 32))  # trained, unlike that of a new backbone
    images = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    pruned = prune(backbone, [images], **CUT, rotate=False, reconstruct="none")
    pruned.save(tmp_path / "folder", transformers.ViTImageProcessor(size={"height": 16, "width": 16}))
    again, stages = (kind.from_pretrained(tmp_path / "folder").eval() for kind in (AutoModel, IsoPruneBackbone))
    with torch.no_grad():
        cut = pruned.model(images).feature_maps
        found = [again(images).feature_maps, stages(images).feature_maps]
    assert [value.shape for value in cut] == [(2, 32, 4, 4)] * 2
    assert all(torch.equal(*pair) for maps in found for pair in zip(cut, maps, strict=True))
    assert stages.out_features == ["stage1", "stage2"] and stages.channels == [32, 32]
    card = (tmp_path / "folder" / "README.md").read_text()
    assert "No pipeline takes the outputs" in card and "pipeline(" not in card


def test_encoder_with_random_outputs_is_refused() -> None:
    torch.manual_seed(0)
    sizes = {"decoder_hidden_size": 16, "decoder_num_hidden_layers": 1, "decoder_num_attention_heads": 2}
    encoder = transformers.ViTMAEModel(transformers.ViTMAEConfig(**TOWER, **sizes))
    with pytest.raises(UnsupportedArchitectureError, match="ViTMAEModel: its outputs are random in eval mode"):
        prune(encoder, [torch.randn(2, 3, 16, 16)], **CUT)
