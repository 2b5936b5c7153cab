from pathlib import Path

import pytest
import timm
import torch
from helpers.tiny_models import FAMILIES, make_base, make_images
from helpers.traced_models import make_timm
from torch import nn
from transformers import ConvNextConfig, DeiTConfig, ResNetConfig, SwinConfig, ViTConfig

from isoprune_hf.checkpoint.modeling_isoprune import IsoPruneConfig, IsoPruneForImageClassification
from isoprune_hf.errors import CheckpointError
from isoprune_hf.pruning.graph.blocks import find_blocks


def build(base: dict[str, object]) -> IsoPruneForImageClassification:
    config = IsoPruneConfig(base=base, num_labels=10, image_size=[3, 224, 224])
    with torch.device("meta"):
        return IsoPruneForImageClassification(config).eval()


def library(library: str, architecture: str) -> dict[str, object]:
    return {"library": library, "architecture": architecture, "args": {}}


def transformers(config: object) -> dict[str, object]:
    return {"library": "transformers", "config": config.to_dict()}


@pytest.mark.parametrize(
    ("base", "count", "signature"),
    [
        (library("timm", "vit_small_patch16_224"), 12, "Block"),
        pytest.param(library("timm", "deit_small_distilled_patch16_224"), 12, "Block", marks=pytest.mark.families),
        pytest.param(
            library("timm", "swin_tiny_patch4_window7_224"),
            2 + 2 + 6 + 2,
            "SwinTransformerBlock",
            marks=pytest.mark.families,
        ),
        (library("timm", "convnext_tiny"), 3 + 3 + 9 + 3, "ConvNeXtBlock"),
        # One block of each stage projects its shortcut; the first stage of resnet18 has none that does.
        pytest.param(library("timm", "resnet50"), 3 + 4 + 6 + 3 - 4, "Bottleneck", marks=pytest.mark.families),
        (library("timm", "resnet18"), 8 - 3, "BasicBlock"),
        (library("torchvision", "mobilenet_v2"), 10, "InvertedResidual"),
        (transformers(ViTConfig()), 12, "ViTLayer"),
        pytest.param(transformers(DeiTConfig()), 12, "DeiTLayer", marks=pytest.mark.families),
        pytest.param(transformers(SwinConfig()), 2 + 2 + 6 + 2, "SwinLayer", marks=pytest.mark.families),
        (transformers(ConvNextConfig()), 3 + 3 + 9 + 3, "ConvNextLayer"),
        pytest.param(
            transformers(ResNetConfig()), 3 + 4 + 6 + 3 - 4, "ResNetBottleNeckLayer", marks=pytest.mark.families
        ),
    ],
    ids=lambda value: value.get("architecture") or value["config"]["model_type"] if isinstance(value, dict) else None,
)
def test_families_have_hand_counted_blocks(base: dict[str, object], count: int, signature: str) -> None:
    blocks = find_blocks(build(base))
    assert len(blocks) == len({block.name for block in blocks}) == count
    assert {block.signature for block in blocks} == {signature}


def test_mobilenet_blocks_are_those_with_shortcut() -> None:
    model = build(library("torchvision", "mobilenet_v2"))
    expected = [f"features.{number}" for number in range(1, 18) if model.model.features[number].use_res_connect]
    assert [block.name for block in find_blocks(model)] == expected


def test_resnet_blocks_are_those_without_projection() -> None:
    model = build(library("timm", "resnet50"))
    expected = [
        f"layer{stage}.{number}"
        for stage in (1, 2, 3, 4)
        for number, block in enumerate(getattr(model.model, f"layer{stage}"))
        if block.downsample is None
    ]
    assert [block.name for block in find_blocks(model)] == expected


def test_block_lists_all_its_parameters() -> None:
    model = make_timm("vit_tiny_patch16_224", img_size=32, depth=2)
    blocks = find_blocks(model)
    names = [name for name, _ in model.model.named_parameters()]
    for number, block in enumerate(blocks):
        assert list(block.parameters) == [name for name in names if name.startswith(f"blocks.{number}.")]
        assert len(block.parameters) == 12


@pytest.mark.parametrize("architecture", ["vgg11", "densenet121"])
def test_networks_without_shortcuts_have_no_blocks(
    architecture: str,
) -> None:
    assert find_blocks(build(library("timm", architecture))) == ()


@pytest.mark.parametrize("family", ["convnext", "hf-convnext", "resnet", "hf-resnet"])
def test_block_without_sibling_is_excluded(family: str, tmp_path: Path) -> None:
    assert find_blocks(make_base(family, tmp_path)) == ()


DEEPER = {
    "vit": ("vit_tiny_patch16_224", 32, {"img_size": 32, "depth": 3}),
    "swin": (
        "swin_tiny_patch4_window7_224",
        56,
        {"img_size": 56, "embed_dim": 24, "depths": (2, 2), "num_heads": (2, 4)},
    ),
    "convnext": ("convnext_atto", 64, {"depths": (2, 2, 2, 2), "dims": (8, 8, 8, 8)}),
    "resnet": ("resnet50", 64, {"layers": (2, 2, 2, 2), "channels": (8, 8, 8, 8)}),
    "resnet18": ("resnet18", 64, {"channels": (8, 8, 8, 8)}),
}


@pytest.mark.parametrize("family", [*DEEPER, "mobilenet_v2", "hf-vit", "hf-deit", "hf-swin"])
def test_block_with_zero_parameters_is_the_identity(family: str, tmp_path: Path) -> None:
    if family in DEEPER:
        architecture, image_size, args = DEEPER[family]
        model = make_timm(architecture, image_size, **args)
    else:
        model = make_base(family, tmp_path)
    blocks = find_blocks(model)
    assert len(blocks) >= 2
    seen = {}
    for block in blocks:
        for name in block.parameters:
            nn.init.zeros_(model.model.get_parameter(name))
        model.model.get_submodule(block.name).register_forward_hook(
            lambda module, args, output, name=block.name: seen.update({name: (args[0].clone(), output)})
        )
    for module in model.model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.zero_()
    with torch.no_grad():
        model(make_images(model))
    assert seen.keys() == {block.name for block in blocks}
    for given, output in seen.values():
        torch.testing.assert_close(output[0] if isinstance(output, tuple) else output, given, rtol=0, atol=0)


@pytest.mark.parametrize("family", FAMILIES)
def test_finding_blocks_leaves_model_unchanged(family: str, tmp_path: Path) -> None:
    model = make_base(family, tmp_path).train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with torch.no_grad():
        find_blocks(model)
    assert all(module.training for module in model.modules())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.model.modules())
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@timm.models.register_model
def unlike_net(num_classes: int = 1000, **_: object) -> nn.Module:
    """Five blocks that do not add to their input, a residual block that is called twice, and one called once."""

    class Unlike(nn.Module):
        def __init__(self, build: type, hidden: int = 8) -> None:
            super().__init__()
            self.linear, self.norm, self.way = nn.Linear(hidden, hidden), nn.LayerNorm(hidden), build

        def forward(self, hidden: torch.Tensor) -> torch.Tensor:
            return {
                "norm of the sum": lambda: self.norm(hidden + self.linear(hidden)),
                "gelu of the sum": lambda: nn.functional.gelu(hidden + self.linear(hidden)),
                "no sum": lambda: self.linear(hidden).relu(),
                "no shortcut": lambda: self.linear(hidden) + self.norm(hidden),
                "product": lambda: hidden * self.linear(hidden),
                "twice": lambda: hidden + self.linear(hidden),
                "once": lambda: hidden + self.linear(hidden),
            }[self.way]()

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.fc = nn.Conv2d(3, 8, 4, 4), nn.Linear(8, num_classes)
            ways = ["norm of the sum", "gelu of the sum", "no sum", "no shortcut", "product", "twice", "once"]
            self.blocks = nn.ModuleList(Unlike(way) for way in ways)

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            hidden = self.stem(images).flatten(2).transpose(1, 2)
            for block in self.blocks:
                hidden = block(hidden)
            return self.fc(self.blocks[5](hidden).mean(1))

    return Net()


def test_block_must_add_to_input_in_every_call() -> None:
    assert [block.name for block in find_blocks(make_timm("unlike_net", 8))] == ["blocks.5", "blocks.6"]


def test_model_that_does_not_run_is_rejected() -> None:
    with pytest.raises(CheckpointError, match=r"config\.image_size") as error:
        find_blocks(make_timm("unlike_net", 2))
    assert "\n" not in str(error.value)
