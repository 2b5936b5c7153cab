"""Removable blocks are found by what they compute; without one, a model equals its base with the block bypassed."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.fresh_python import FreshPython
from helpers.marks import one_of_each
from helpers.tiny_models import SWIN, VIT
from safetensors.torch import load_file
from torch import nn
from transformers import (
    AutoModelForImageClassification,
    ConvNextConfig,
    DeiTConfig,
    ResNetConfig,
    SwinConfig,
    ViTConfig,
)

from isoprune_hf.checkpoint.modeling_isoprune import (
    IsoPruneConfig,
    IsoPruneForImageClassification,
    SkippedBlock,
    check_structure,
    skippable_blocks,
)
from isoprune_hf.checkpoint.structure import capture_structure, meta_copy
from isoprune_hf.errors import CheckpointError

SIZES = {"image_size": 16, "patch_size": 4, "hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 64}
TEACHER = ["DeiTForImageClassificationWithTeacher"]
# Name -> library, architecture or config, arguments, side of the image, and the blocks that may be skipped, by hand.
BASES: dict[str, tuple[str, Any, dict[str, Any], int, list[str]]] = {
    "vit": ("timm", "vit_tiny_patch16_224", {**VIT, "init_values": 0.1}, 16, ["blocks.0", "blocks.1"]),
    "deit": ("timm", "deit_tiny_distilled_patch16_224", VIT, 16, ["blocks.0", "blocks.1"]),
    "swin": (
        "timm",
        "swin_tiny_patch4_window7_224",
        SWIN,
        56,
        ["layers.0.blocks.0", "layers.0.blocks.1", "layers.1.blocks.0", "layers.1.blocks.1"],
    ),
    "convnext": (
        "timm",
        "convnext_atto",
        {"depths": [1, 2, 1, 1], "dims": [16, 24, 32, 40]},
        64,
        ["stages.0.blocks.0", "stages.1.blocks.0", "stages.1.blocks.1", "stages.2.blocks.0", "stages.3.blocks.0"],
    ),
    # The first block of a stage has a projection on its shortcut.
    "resnet": (
        "timm",
        "resnet50",
        {"layers": [3, 2, 1, 1], "channels": [8, 16, 24, 32]},
        64,
        ["layer1.1", "layer1.2", "layer2.1"],
    ),
    # The first stage of basic blocks keeps its 64 channels and has none.
    "resnet-basic": ("timm", "resnet18", {"layers": [1, 2, 1, 1]}, 64, ["layer1.0", "layer2.1"]),
    # Of the 17 inverted residuals, those that change stride or channels have no shortcut; at this width the first,
    # of 16 channels rounded to 8, keeps the 8 of the stem.
    "mobilenet_v2": (
        "torchvision",
        "mobilenet_v2",
        {"width_mult": 0.25},
        64,
        [f"features.{n}" for n in (1, 3, 5, 6, 8, 9, 10, 12, 13, 15, 16)],
    ),
    "tv-resnet": ("torchvision", "resnet18", {}, 64, ["layer1.0", "layer1.1", "layer2.1", "layer3.1", "layer4.1"]),
    "hf-vit": ("transformers", ViTConfig(**SIZES, num_hidden_layers=2), {}, 16, ["vit.layers.0", "vit.layers.1"]),
    "hf-deit": (
        "transformers",
        DeiTConfig(**SIZES, num_hidden_layers=2, architectures=TEACHER),
        {},
        16,
        ["deit.layers.0", "deit.layers.1"],
    ),
    "hf-swin": (
        "transformers",
        SwinConfig(image_size=56, embed_dim=24, depths=[2, 2], num_heads=[2, 4], window_size=7),
        {},
        56,
        [f"swin.encoder.layers.{stage}.blocks.{block}" for stage in (0, 1) for block in (0, 1)],
    ),
    "hf-convnext": (
        "transformers",
        ConvNextConfig(image_size=32, depths=[1, 2, 1, 1], hidden_sizes=[16, 24, 32, 40]),
        {},
        32,
        [
            f"convnext.encoder.stages.{place}"
            for place in ("0.layers.0", "1.layers.0", "1.layers.1", "2.layers.0", "3.layers.0")
        ],
    ),
    "hf-resnet": (
        "transformers",
        ResNetConfig(embedding_size=16, hidden_sizes=[32, 48, 64, 80], depths=[3, 2, 1, 1]),
        {},
        64,
        [f"resnet.encoder.stages.{place}" for place in ("0.layers.1", "0.layers.2", "1.layers.1")],
    ),
}

CASES = one_of_each(BASES, "vit", "swin", "convnext", "resnet", "mobilenet_v2", "hf-vit", "hf-convnext")


def config_of(name: str, structure: dict[str, Any] | None = None) -> IsoPruneConfig:
    library, what, args, side, _ = BASES[name]
    base = {"library": library, "architecture": what, "args": args}
    if library == "transformers":
        base = {"library": library, "config": what.to_diff_dict() | {"model_type": what.model_type}}
    return IsoPruneConfig(base=base, num_labels=5, structure=structure, image_size=[3, side, side])


def fill(model: nn.Module) -> None:
    """Draw weights that keep every part of the network active."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if name.endswith("running_var"):
                tensor.copy_(torch.rand(tensor.shape, generator=generator) + 0.5)
            elif tensor.is_floating_point():
                scale = 1.0 if tensor.ndim == 1 else tensor[0].numel() ** -0.5
                tensor.copy_(torch.randn(tensor.shape, generator=generator) * scale)


def logits(model: nn.Module, images: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model(images).logits


def without(name: str, removed: list[str]) -> tuple[IsoPruneForImageClassification, torch.Tensor, torch.Tensor]:
    """Return a model without blocks, images, and the logits of its base with those blocks bypassed."""
    dense = IsoPruneForImageClassification(config_of(name)).eval()
    fill(dense)
    model = IsoPruneForImageClassification(config_of(name, {"removed": removed})).eval()
    model.load_state_dict({k: v for k, v in dense.state_dict().items() if k in model.state_dict()})
    images = torch.randn(2, *dense.config.image_size, generator=torch.Generator().manual_seed(2))
    whole = logits(dense, images)
    for path in removed:
        gives_pair = name == "hf-swin"
        dense.model.get_submodule(path).forward = lambda x, *_, pair=gives_pair, **__: (x, None) if pair else x
    expected = logits(dense, images)
    assert not torch.equal(expected, whole)  # the block mattered
    return model, images, expected


@pytest.mark.parametrize("name", CASES)
def test_skippable_blocks_are_the_residual_ones(name: str) -> None:
    found = skippable_blocks(config_of(name))
    assert list(found) == BASES[name][4]
    assert {block.outputs for block in found.values()} == {2 if name == "hf-swin" else 0}


@pytest.mark.parametrize("name", one_of_each(BASES, "vit", "resnet", mark="faults"))
def test_removed_block_equals_bypassed_block(name: str, tmp_path: Path) -> None:
    blocks = BASES[name][4]
    for removed in ([blocks[0]], [blocks[-1]], blocks):
        model, images, expected = without(name, removed)
        assert torch.equal(logits(model, images), expected)
    model, images, expected = without(name, [blocks[-1]])
    model.save_pretrained(tmp_path)
    assert not any(f".{blocks[-1]}." in key for key in load_file(tmp_path / "model.safetensors"))
    reopened = AutoModelForImageClassification.from_pretrained(tmp_path)
    assert torch.equal(logits(reopened, images), expected)
    assert capture_structure(meta_copy(model, dense=True).model, reopened.model)["removed"] == [blocks[-1]]


@pytest.mark.parametrize("name", CASES)
def test_every_other_module_is_refused(name: str) -> None:
    config = config_of(name)
    base, skippable = meta_copy(IsoPruneForImageClassification(config)).model, skippable_blocks(config)
    others = [path for path, _ in base.named_modules() if path not in skippable]
    assert any(path.startswith(("head", "fc", "classifier", "cls_classifier")) for path in others)
    for path in others:
        with pytest.raises(CheckpointError, match=r"^config\.structure\.removed: "):
            check_structure(base, {"removed": [path]}, skippable)


@pytest.mark.parametrize(
    ("name", "removed"),
    [
        ("vit", ["head"]),
        pytest.param("vit", ["patch_embed"], marks=pytest.mark.families),
        pytest.param("vit", ["norm"], marks=pytest.mark.families),
        ("vit", ["blocks"]),
        pytest.param("vit", ["blocks.0.mlp"], marks=pytest.mark.families),
        ("vit", ["blocks.0", "blocks.0"]),
        ("vit", ["blocks.0", "blocks.0.mlp"]),
        pytest.param("swin", ["layers.0"], marks=pytest.mark.families),
        ("swin", ["layers.1.downsample"]),
        ("resnet", ["layer1.0"]),
        pytest.param("resnet", ["layer4"], marks=pytest.mark.families),
        pytest.param("convnext", ["stages.1.downsample"], marks=pytest.mark.families),
        ("mobilenet_v2", ["features.2"]),
        pytest.param("mobilenet_v2", ["features.18"], marks=pytest.mark.families),
        ("hf-resnet", ["resnet.encoder.stages.0.layers.1.layer.0"]),
        pytest.param("hf-swin", ["swin.encoder.layers.1"], marks=pytest.mark.families),
    ],
)
def test_folder_that_removes_another_module_is_refused(name: str, removed: list[str], tmp_path: Path) -> None:
    model = IsoPruneForImageClassification(config_of(name))
    model.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**saved, "structure": {"removed": removed}}))
    with pytest.raises(CheckpointError) as caught:
        AutoModelForImageClassification.from_pretrained(tmp_path)
    assert str(caught.value).startswith(f"config.structure.removed: {removed[-1]!r} ")


def test_search_in_base_of_terabytes_allocates_nothing() -> None:
    config = config_of("vit")
    config.base["args"] = {**VIT, "embed_dim": 10**6}
    assert list(skippable_blocks(config)) == ["blocks.0", "blocks.1"]


@pytest.mark.parametrize("size", [None, [3, 16, 17], [1, 16, 16]])
def test_search_needs_an_image_that_fits(size: list[int] | None) -> None:
    config = config_of("vit")
    config.image_size = size
    with pytest.raises(CheckpointError, match=r"^config\.image_size: "):
        skippable_blocks(config)


def test_search_works_without_gradients_and_changes_no_state() -> None:
    before = torch.get_rng_state()
    for mode in (torch.no_grad(), torch.inference_mode()):
        with mode:
            assert list(skippable_blocks(config_of("swin"))) == BASES["swin"][4]
            assert not torch.is_grad_enabled()
    assert torch.equal(torch.get_rng_state(), before)


def test_skipped_block_returns_its_first_input() -> None:
    hidden = torch.randn(2, 3)
    assert SkippedBlock()(hidden, None, mask=1) is hidden
    for length in (1, 2, 3):
        first, *others = SkippedBlock(length)(hidden, (4, 4))
        assert first is hidden and others == [None] * (length - 1)


ELSEWHERE = """
import json, sys
import torch
from transformers import AutoModelForImageClassification
model = AutoModelForImageClassification.from_pretrained(sys.argv[1], trust_remote_code=True)
with torch.no_grad():
    print(json.dumps(model(torch.load(sys.argv[1] + "/images.pt")).logits.tolist()))
"""


def test_model_without_block_opens_without_package(fresh_python: FreshPython, tmp_path: Path) -> None:
    model, images, expected = without("hf-swin", [BASES["hf-swin"][4][1]])
    model.save_pretrained(tmp_path / "folder")
    torch.save(images, tmp_path / "folder" / "images.pt")
    done = fresh_python.run(ELSEWHERE, tmp_path / "folder", absent=["isoprune_hf"])
    assert done.returncode == 0, done.stderr
    assert torch.equal(torch.tensor(json.loads(done.stdout.splitlines()[-1])), expected)
