"""Bases that cannot be built safely are refused by name."""

from typing import Any

import pytest
import torch
from helpers.folders import VIT_BASE, logits, refused
from transformers import (
    AutoModelForImageClassification,
)


@pytest.mark.parametrize("library", ["keras", "os", None, 1, ["timm"], {"timm": 1}])
def test_unknown_library_is_refused(library: Any, edited) -> None:
    message = refused(edited(lambda config: config["base"].update(library=library)))
    assert message.startswith("config.base: library must be one of timm, torchvision, transformers")


@pytest.mark.parametrize("base", [None, "timm", ["timm"], {}, 1])
def test_base_of_wrong_form_is_refused(base: Any, edited) -> None:
    assert refused(edited(lambda config: config.update(base=base))).startswith("config.base: ")


@pytest.mark.parametrize(
    ("library", "architecture"),
    [
        ("timm", "nosuch_model"),
        ("timm", "hf-hub:someone/model"),
        ("timm", "local-dir:/etc"),
        ("timm", ""),
        ("torchvision", "nosuch_model"),
        ("torchvision", "fasterrcnn_resnet50_fpn"),
        ("torchvision", "quantized_mobilenet_v2"),
    ],
)
def test_unknown_architecture_is_refused(library: str, architecture: str, edited) -> None:
    message = refused(edited(lambda config: config["base"].update(library=library, architecture=architecture)))
    assert message.startswith("config.base.architecture: ") and repr(architecture) in message


@pytest.mark.parametrize("architecture", [None, 1, ["resnet18"]])
def test_architecture_must_be_a_string(architecture: Any, edited) -> None:
    assert refused(edited(lambda config: config["base"].update(architecture=architecture))).startswith("config.base: ")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("pretrained", True),
        ("pretrained", False),
        ("checkpoint_path", "weights.pth"),
        ("cache_dir", "weights"),
        ("pretrained_cfg", "x"),
        ("pretrained_cfg_overlay", {"file": "weights.pth"}),
        ("features_only", True),
        ("scriptable", True),
        ("num_classes", 7),
        ("weights", "DEFAULT"),
        ("weights_backbone", "DEFAULT"),
        ("block_args", {"pretrained_cfg": {"file": "weights.pth"}}),
        ("block_args", [[{"checkpoint_path": "weights.pth"}]]),
    ],
)
def test_unsafe_argument_is_refused(name: str, value: Any, edited) -> None:
    folder = edited(lambda config: config["base"]["args"].update({name: value}))
    assert refused(folder) == f"config.base.args: {name}={value!r} is not allowed"


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("nosuch_argument", 1),
        ("embed_dim", -1),
        ("embed_dim", "32"),
        ("embed_dim", 30.5),
        ("num_heads", 5),
        ("num_heads", 0),
        ("patch_size", 0),
        ("act_layer", "nosuch"),
        ("norm_layer", "nosuch"),
        ("drop_path_rate", "x"),
        ("model_name", "resnet18"),
    ],
)
def test_argument_refused_by_builder_is_named(name: str, value: Any, edited) -> None:
    message = refused(edited(lambda config: config["base"]["args"].update({name: value})))
    assert message.startswith("config.base: vit_tiny_patch16_224 with {") and f"{name!r}: {value!r}" in message


@pytest.mark.parametrize("args", ["x", [1], 1])
def test_args_must_be_a_mapping(args: Any, edited) -> None:
    assert refused(edited(lambda config: config["base"].update(args=args))).startswith("config.base: ")


@pytest.mark.parametrize(
    "changes",
    [
        {"model_type": "bert"},
        {"model_type": "detr"},
        {"model_type": "nosuch"},
        {"model_type": None},
        {"model_type": ["vit"]},
        {"model_type": "timm_wrapper", "architecture": "resnet18"},
        {"model_type": "isoprune", "base": VIT_BASE},
        {"hidden_size": "32"},
        {"hidden_act": "nosuch"},
        {"num_attention_heads": 0},
        {"patch_size": 0},
        {"architectures": 5},
        {"architectures": [["ViTForImageClassification"]]},
    ],
)
def test_unsuitable_transformers_config_is_refused(changes: dict, edited) -> None:
    folder = edited(lambda config: config["base"]["config"].update(changes), family="hf-vit")
    assert refused(folder).startswith("config.base.config: ")


@pytest.mark.parametrize("name", ["attn_implementation", "_attn_implementation", "_attn_implementation_internal"])
def test_kernel_named_by_config_is_not_fetched(name: str, edited, pruned) -> None:
    folder = edited(lambda config: config["base"]["config"].update({name: "someone/kernel"}), family="hf-vit")
    model = AutoModelForImageClassification.from_pretrained(folder)
    assert model.model.config._attn_implementation == "sdpa"
    assert torch.equal(logits(model, pruned("hf-vit").images), pruned("hf-vit").logits)


@pytest.mark.parametrize("values", [None, [], "vit", 3])
def test_transformers_config_must_be_a_mapping(values: Any, edited) -> None:
    folder = edited(lambda config: config["base"].update(config=values), family="hf-vit")
    assert refused(folder).startswith("config.base.config: ")
