"""Nested arguments of builders: networks open from config.json as they were built at first."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from helpers.bases import assert_same, output_of, refused, seeded_images, weights
from helpers.marks import one_of_each
from torch import nn

from isoprune_hf import PruneRecipe, prune_model
from isoprune_hf.checkpoint.folder import save_model_folder
from isoprune_hf.models import load_base

STAGES = [
    [{"block_type": "cn", "width": 16, "kernels": [3, 1]}],
    [{"block_type": "ir", "width": 24, "kernels": [5]}] * 2,
]


class Staged(nn.Module):
    """A network described as the decoded blocks of timm's EfficientNet: lists of lists of mappings."""

    def __init__(self, stages: Any, num_classes: int):
        super().__init__()
        self.num_classes, width, layers = num_classes, 3, []
        for stage in stages:
            assert type(stage) is list  # as the builder of EfficientNet
            for block in stage:
                block.pop("block_type")  # as some builders do
                for kernel in block["kernels"]:
                    layers += [nn.Conv2d(width, block["width"], kernel, padding=kernel // 2), nn.ReLU()]
                    width = block["width"]
        self.layers, self.head = nn.Sequential(*layers), nn.Linear(width, num_classes)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.head(self.layers(images).mean((2, 3)))


def isoprune_staged(num_classes: int = 5, stages: Any = (), **_: Any) -> nn.Module:
    network = Staged(stages, num_classes)
    network.pretrained_cfg = {"input_size": (3, 16, 16), "num_classes": num_classes}
    return network


timm.models.register_model(isoprune_staged)
SMALL = {"layers": [1, 1, 1, 1], "channels": [16, 16, 24, 32], "stem_width": 16}
# Name -> arguments with nested values.
NESTED: dict[str, tuple[str, dict[str, Any]]] = {
    "mapping": ("timm/resnet18", {**SMALL, "block_args": {"attn_layer": "se"}}),
    "nested mapping": (
        "timm/skresnet18",
        {**SMALL, "block_args": {"sk_kwargs": {"rd_ratio": 0.25, "split_input": True}}},
    ),
    "lists of mappings": ("timm/isoprune_staged", {"stages": STAGES}),
    "tuples in tuples": ("torchvision/mobilenet_v2", {"inverted_residual_setting": ((1, 16, 1, 1), (2, 24, 1, 2))}),
}


@pytest.mark.parametrize("kind", one_of_each(NESTED, "nested mapping"))
def test_nested_arguments_open_with_equal_logits(kind: str, tmp_path: Path) -> None:
    name, args = NESTED[kind]
    base = load_base(name, pretrained=False, model_args=args, num_labels=5)
    save_model_folder(tmp_path / "dense", base.model, base.processor)
    images = seeded_images(base)
    expected = output_of(base.model, images)
    again = load_base(str(tmp_path / "dense"))
    assert torch.equal(output_of(again.model, images), expected)
    source = again.model.config.source
    redrawn = load_base(source["name"], False, model_args=source["model_args"], num_labels=5, seed=source["seed"])
    assert_same(weights(redrawn.model), weights(base.model))
    result = prune_model(base.model, PruneRecipe(criterion="l1", ratio=0.5))
    result.save(tmp_path / "pruned", base.processor)
    pruned = load_base(str(tmp_path / "pruned")).model
    assert torch.equal(output_of(pruned, images), output_of(result.model, images))


def test_nested_arguments_reach_the_builder() -> None:
    assert timm.create_model("resnet18", block_args={"attn_layer": "se"}).layer1[0].se is not None
    for kind, part in {
        "mapping": "model.layer1.0.se.fc1.weight",
        "nested mapping": "model.layer1.0.conv1.attn.fc_reduce.weight",
    }.items():
        name, args = NESTED[kind]
        plain = load_base(name, pretrained=False, model_args=SMALL).model.state_dict()
        nested = load_base(name, pretrained=False, model_args=args).model.state_dict()
        assert part in nested and (part not in plain or nested[part].shape != plain[part].shape)


@dataclass
class BlockConfig:
    width: int = 16


@pytest.fixture
def no_build(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Record every module that is registered."""
    built: list[str] = []
    hook = nn.modules.module.register_module_module_registration_hook(lambda _, name, __: built.append(name))
    yield built
    hook.remove()


@pytest.mark.parametrize(
    ("name", "args"),
    [
        ("timm/vit_tiny_patch16_224", {"norm_layer": partial(nn.LayerNorm, eps=1e-6)}),
        ("timm/resnet18", {"block_args": {"attn_layer": nn.Identity}}),
        ("timm/gernet_s", {"blocks": (BlockConfig(), BlockConfig())}),
        ("timm/isoprune_staged", {"stages": [[{3: "ir"}]]}),
        ("torchvision/efficientnet_b0", {"norm_layer": partial(nn.BatchNorm2d, eps=1e-3)}),
        ("torchvision/mobilenet_v2", {"inverted_residual_setting": [torch.ones(4)]}),
        ("timm/resnet18", {"block_args": {"pretrained_cfg": {"file": "weights.pth"}}}),
    ],
)
def test_argument_that_json_lacks_is_refused(name: str, args: dict[str, Any], no_build: list[str]) -> None:
    message = refused(name, pretrained=False, model_args=args)
    assert next(iter(args)) in message and "prune.model_args" in message
    assert no_build == []
