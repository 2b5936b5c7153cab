"""Small bases of every supported family, with seeded random weights that leave no part of the network idle."""

import copy
import functools
import json
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from helpers.marks import one_of_each
from transformers import ConvNextConfig, DeiTConfig, ResNetConfig, SwinConfig, ViTConfig

from isoprune_hf.checkpoint.modeling_isoprune import IsoPruneConfig, IsoPruneForImageClassification
from isoprune_hf.models import load_base

VIT = {"img_size": 16, "patch_size": 4, "embed_dim": 32, "depth": 2, "num_heads": 4}
SWIN = {"img_size": 56, "embed_dim": 24, "depths": [2, 2], "num_heads": [2, 4], "window_size": 7}
MOBILE = [[1, 16, 1, 1], [6, 24, 2, 2], [6, 32, 2, 2], [6, 96, 1, 2]]  # expansion, width, blocks, stride
TIMM = {
    "vit": ("timm/vit_tiny_patch16_224", {**VIT, "init_values": 1e-1}),
    "deit": ("timm/deit_tiny_distilled_patch16_224", VIT),
    "swin": ("timm/swin_tiny_patch4_window7_224", SWIN),
    "convnext": ("timm/convnext_atto", {"depths": [1, 1, 1, 1], "dims": [16, 24, 32, 40], "conv_mlp": False}),
    "resnet": ("timm/resnet50", {"layers": [1, 1, 1, 1], "channels": [8, 16, 24, 32], "stem_width": 16}),
    "resnext": (
        "timm/resnext50_32x4d",
        {"layers": [1, 1, 1, 1], "channels": [16, 24, 32, 40], "cardinality": 4, "base_width": 16},
    ),
    "resnet-gn": ("timm/resnet50_gn", {"layers": [1, 1, 1, 1], "channels": [128, 128, 128, 128], "stem_width": 128}),
    "mobilenet_v2": ("torchvision/mobilenet_v2", {"width_mult": 0.25, "inverted_residual_setting": MOBILE}),
}
TRANSFORMERS = {
    "hf-vit": ViTConfig(
        image_size=16, patch_size=4, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64
    ),
    "hf-deit": DeiTConfig(
        image_size=16,
        patch_size=4,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=64,
        architectures=["DeiTForImageClassificationWithTeacher"],
    ),
    "hf-swin": SwinConfig(image_size=56, embed_dim=24, depths=[2, 2], num_heads=[2, 4], window_size=7),
    "hf-convnext": ConvNextConfig(image_size=32, depths=[1, 1, 1, 1], hidden_sizes=[16, 24, 32, 40]),
    "hf-resnet": ResNetConfig(embedding_size=16, hidden_sizes=[32, 48, 64, 80], depths=[1, 1, 1, 1]),
}
ALL_FAMILIES = [*TIMM, *TRANSFORMERS]
# Parameters of tests: the variants of a family that another one stands for are run by `make test-all`.
FAMILIES = one_of_each(ALL_FAMILIES, "vit", "swin", "convnext", "resnet", "mobilenet_v2", "hf-vit")


def make_base(family: str, folder: Path, labels: int = 7) -> IsoPruneForImageClassification:
    """Build the tiny base of a family; `folder` holds the config of a transformers model."""
    name, args = TIMM.get(family, (family, None))
    model = copy.deepcopy(_build_base(family, name, json.dumps(args), labels))
    if family in TRANSFORMERS:
        TRANSFORMERS[family].save_pretrained(folder / family)
        model.config.source = {**model.config.source, "name": str(folder / family)}
    return model


@functools.cache
def _build_base(family: str, name: str, args: str, labels: int) -> IsoPruneForImageClassification:
    """Build a base once for each name and arguments (JSON), since tests may replace the entry of a family."""
    if family in TIMM:
        model = load_base(name, pretrained=False, model_args=json.loads(args), num_labels=labels, seed=0).model
    else:
        with TemporaryDirectory() as folder:
            TRANSFORMERS[family].save_pretrained(folder)
            model = load_base(folder, pretrained=False, num_labels=labels, seed=0).model
    if family in ("convnext", "resnet", "resnext", "resnet-gn", "mobilenet_v2", "hf-resnet"):
        model.config.image_size = [3, 64, 64]
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, tensor in model.model.state_dict().items():
            if name.endswith("running_var"):
                tensor.copy_(torch.rand(tensor.shape, generator=generator) + 0.5)
            elif tensor.is_floating_point():
                scale = 1.0 if tensor.ndim == 1 or "token" in name or "pos" in name else tensor[0].numel() ** -0.5
                tensor.copy_(torch.randn(tensor.shape, generator=generator) * scale)
    return model


def make_images(model: IsoPruneForImageClassification, count: int = 2, seed: int = 2) -> torch.Tensor:
    """Draw normalised images of the model's size."""
    return torch.randn(count, *model.config.image_size, generator=torch.Generator().manual_seed(seed))


def on_meta(name: str) -> IsoPruneForImageClassification:
    config = IsoPruneConfig(
        base={"library": "timm", "architecture": name, "args": {}}, num_labels=1000, image_size=[3, 224, 224]
    )
    with torch.device("meta"):
        return IsoPruneForImageClassification(config)
