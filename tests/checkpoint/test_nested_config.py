"""Configs of transformers whose entries would be fetched, at any depth, and nested configs of another kind."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    CONFIG_MAPPING,
    CLIPConfig,
    DPTConfig,
    EdgeTamVisionConfig,
    ResNetConfig,
    Sam2VisionConfig,
    UperNetConfig,
    ViTConfig,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING

from isoprune_hf.checkpoint.dense import IsoPruneConfig, build_base
from isoprune_hf.checkpoint.nested_config import check_config
from isoprune_hf.errors import CheckpointError, IsoPruneError
from isoprune_hf.models import load_base

NAMING_TIMM = ["detr", "conditional_detr", "deformable_detr", "dab-detr", "table-transformer"]
TOWER = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
REFUSED: dict[str, tuple[str, dict[str, Any]]] = {
    "vision of another kind": ("clip", {"vision_config": {"model_type": "timm_wrapper", "architecture": "resnet18"}}),
    "text of another kind": ("siglip", {"text_config": {"model_type": "detr", "backbone": "someone/model"}}),
    "kind that is no text": ("clip", {"vision_config": {"model_type": ["clip_vision_model"]}}),
    "any kind": ("shieldgemma2", {"vision_config": {"model_type": "vit"}}),
    "any kind by default": ("shieldgemma2", {}),
    "kind where none is": ("vit", {"pooler": {"model_type": "detr"}}),
    "kind in a list": ("vit", {"parts": [[{"model_type": "vit"}]]}),
    "backbone": ("vit", {"backbone": "someone/model"}),
    "backbone deep inside": ("clip", {"vision_config": {"deep": [{"backbone_config": {"a": 1}}]}}),
    "pretrained backbone": ("vit", {"use_pretrained_backbone": True}),
    "address": ("vit", {"hidden_act": "https://example.com/act.py"}),
    "file": ("vit", {"hidden_act": "file:///etc/passwd"}),
    "Hub": ("resnet", {"embedding": {"name": "hf-hub:someone/model"}}),
    "folder": ("clip", {"vision_config": {"source": "local-dir:/etc"}}),
    "bucket": ("vit", {"extra": ["s3://bucket/key"]}),
}


@pytest.mark.parametrize("kind", MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING.keys(), ids=lambda kind: kind.model_type)
def test_honest_config_of_each_kind_passes(kind: Any) -> None:
    values = kind().to_diff_dict()
    if kind.model_type == "shieldgemma2":
        with pytest.raises(CheckpointError, match="of any kind and is not supported"):
            check_config(kind, values)
    else:
        assert check_config(kind, values).keys() <= values.keys()


@pytest.mark.parametrize("name", REFUSED)
def test_entry_that_would_be_fetched_is_refused(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the config of a folder of ours, and in a folder of transformers before its class reads it."""
    kind, changes = REFUSED[name]
    values = {"model_type": kind, **changes}
    monkeypatch.setattr("socket.socket.connect", lambda *_: pytest.fail("contacted"))
    monkeypatch.setattr("transformers.AutoConfig.from_pretrained", lambda *_, **__: pytest.fail("read"))
    base = {"library": "transformers", "config": values}
    with pytest.raises(CheckpointError) as caught:
        build_base(IsoPruneConfig(base=base, num_labels=2))
    assert str(caught.value).startswith("config.base.config") and "\n" not in str(caught.value)
    (tmp_path / "config.json").write_text(json.dumps(values))
    with pytest.raises(IsoPruneError):
        load_base(str(tmp_path), pretrained=False)


@pytest.mark.parametrize(
    "backbone",
    [
        {"model_type": "timm_backbone", "backbone": "someone/model"},
        {"model_type": "timm_backbone", "backbone": "hf-hub:someone"},
        {"model_type": "timm_backbone", "backbone": "resnet18", "use_pretrained_backbone": True},
        {"model_type": "detr"},
        {"model_type": ["resnet"]},
        {"hidden_sizes": [8]},
        {"model_type": "resnet", "use_pretrained_backbone": True},
        {"model_type": "resnet", "_commit": {"backbone": "someone/model"}, "backbone": "someone/model"},
    ],
    ids=str,
)
def test_backbone_that_would_be_fetched_is_refused(backbone: dict[str, Any]) -> None:
    with pytest.raises(CheckpointError, match=r"^config\.base\.config\.backbone_config: "):
        check_config(UperNetConfig, {"backbone_config": backbone})


def test_honest_backbone_passes() -> None:
    values = UperNetConfig(backbone_config=ResNetConfig(hidden_sizes=[8, 8], depths=[1, 1])).to_diff_dict()
    checked = check_config(UperNetConfig, values)
    assert checked["backbone_config"]["hidden_sizes"] == [8, 8]
    assert check_config(DPTConfig, {"backbone_out_indices": [0, 1], "backbone_config": None}).keys()


def test_encoder_of_the_class_passes_as_backbone() -> None:
    """SAM 2's encoder is none of transformers' backbones; the wrapper of timm takes arguments for timm."""
    values = Sam2VisionConfig().to_diff_dict()
    checked = check_config(Sam2VisionConfig, values)
    assert checked["backbone_config"]["model_type"] == "sam2_hiera_det_model"
    assert checked["backbone_channel_list"] == [768, 384, 192, 96]
    wrapper = {"model_type": "timm_wrapper", "architecture": "resnet18", "model_args": {"pretrained": True}}
    for kind in (EdgeTamVisionConfig, UperNetConfig):
        with pytest.raises(CheckpointError, match=r"'timm_wrapper' is not a backbone of transformers$"):
            check_config(kind, {"backbone_config": wrapper})
    with pytest.raises(CheckpointError, match=r"'sam2_hiera_det_model' is not a backbone of transformers$"):
        check_config(UperNetConfig, {"backbone_config": values["backbone_config"]})


@pytest.mark.parametrize("kind", NAMING_TIMM)
def test_backbone_of_timm_is_built_without_fetching(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In an old config by its name alone, and in a config of transformers 5 as it writes itself."""
    monkeypatch.setattr("socket.socket.connect", lambda *_: pytest.fail("contacted"))
    old = {"model_type": kind, "backbone": "resnet18", "use_timm_backbone": True, "use_pretrained_backbone": True}
    check_config(CONFIG_MAPPING[kind], old)
    read = CONFIG_MAPPING[kind](**old)
    assert read.backbone_config.backbone == "resnet18"
    base = {"library": "transformers", "config": read.to_diff_dict(), "task": "object-detection"}
    with torch.device("meta"):
        network = build_base(IsoPruneConfig(base=base, num_labels=2))
    assert sum(name.endswith("layer4.1.conv2.weight") for name, _ in network.named_parameters()) == 1


@pytest.mark.parametrize(
    "changes",
    [
        {"backbone": "someone/model"},
        {"backbone": "local-dir:/etc"},
        {"backbone": "resnet18", "use_timm_backbone": False},
        {"backbone": "resnet18", "backbone_kwargs": {"out_indices": [1]}},
        {"backbone": "resnet18", "backbone_config": {"model_type": "resnet"}},
    ],
    ids=str,
)
def test_named_backbone_that_would_be_fetched_is_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(CheckpointError, match=r"backbone.* is not allowed$"):
        check_config(CONFIG_MAPPING["detr"], changes)


def test_implementations_of_nested_configs_are_dropped() -> None:
    values = {"model_type": "clip", "vision_config": {**TOWER, "_attn_implementation": "someone/kernel"}}
    assert check_config(CLIPConfig, values)["vision_config"] == TOWER


@pytest.mark.parametrize(
    "changes",
    [
        {"attn_implementation": "someone/kernel"},
        {"attn_implementation": {"vision_config": "someone/kernel@main:run"}},
        {"vision_config": {"_attn_implementation": "someone/kernel"}},
        {"experts_implementation": "someone/kernel"},
    ],
)
def test_kernel_in_folder_of_transformers_is_refused(changes: dict, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "clip", **changes}))
    with pytest.raises(IsoPruneError, match="names a kernel to fetch"):
        load_base(str(tmp_path), pretrained=False)


@pytest.mark.parametrize("kind", ["detr", "dpt", "maskformer", "upernet", "bert", "vision-encoder-decoder"])
def test_folder_of_another_task_is_refused_unread(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert kind in CONFIG_MAPPING
    monkeypatch.setattr("transformers.AutoConfig.from_pretrained", lambda *_, **__: pytest.fail("read"))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": kind, "backbone": "someone/model"}))
    with pytest.raises(IsoPruneError, match=f"is of type {kind}"):
        load_base(str(tmp_path), pretrained=False)


def test_type_is_not_guessed_from_the_name(tmp_path: Path) -> None:
    folder = tmp_path / "vit"
    ViTConfig(**TOWER).save_pretrained(folder)
    values = json.loads((folder / "config.json").read_text())
    del values["model_type"]
    (folder / "config.json").write_text(json.dumps(values))
    with pytest.raises(IsoPruneError, match="has no model_type"):
        load_base(str(folder), pretrained=False)


def test_labels_may_be_addresses() -> None:
    labels = {"id2label": {"0": "https://example.com", "1": "b"}}
    assert check_config(ViTConfig, labels) == labels
