"""Encoders without a head from folders: they open with their own weights and a new head."""

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import transformers
from helpers.bases import assert_same, output_of, put_in_cache, refused, seeded_images, weights
from helpers.marks import one_of_each
from helpers.tiny_models import TRANSFORMERS, VIT
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import PreTrainedModel, TimmWrapperConfig, TimmWrapperModel

from isoprune_hf import PruneRecipe, prune_model
from isoprune_hf.checkpoint.folder import save_model_folder
from isoprune_hf.commands.steps.sources import open_source
from isoprune_hf.models import BaseModel, load_base

TOWER = {
    "image_size": 16,
    "patch_size": 4,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
}
TEXT = {"vocab_size": 8, "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
LABELS = tuple("abcdefg")
# Class of the encoder -> its config, the prefix of its tensors in the classifier, and tensors that a classifier lacks.
ENCODERS: dict[str, tuple[transformers.PreTrainedConfig, str, tuple[str, ...]]] = {
    "ViTModel": (TRANSFORMERS["hf-vit"], "vit.", ("pooler.",)),
    "DeiTModel": (transformers.DeiTConfig(**TOWER), "deit.", ("pooler.",)),
    "Dinov2Model": (transformers.Dinov2Config(**TOWER), "dinov2.", ()),
    "BeitModel": (transformers.BeitConfig(**TOWER), "beit.", ()),
    "Data2VecVisionModel": (transformers.Data2VecVisionConfig(**TOWER), "data2vec_vision.", ()),
    "SwinModel": (TRANSFORMERS["hf-swin"], "swin.", ()),
    "ConvNextModel": (TRANSFORMERS["hf-convnext"], "convnext.", ()),
    "ResNetModel": (TRANSFORMERS["hf-resnet"], "resnet.", ()),
    "SwiftFormerModel": (
        transformers.SwiftFormerConfig(image_size=64, depths=[1, 1, 1, 1], embed_dims=[16, 24, 32, 40]),
        "swiftformer.",
        (),
    ),
    "CLIPModel": (
        transformers.CLIPConfig(vision_config=TOWER, text_config=TEXT),
        "",
        ("text", "logit", "visual_proj"),
    ),
}


def save_encoder(name: str, folder: Path, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    """Write the folder of an encoder with random weights, and return its tensors by their names in a classifier."""
    config, prefix, unused = ENCODERS[name]
    torch.manual_seed(6)
    model: PreTrainedModel = getattr(transformers, name)(config).to(dtype)
    for tensor in model.state_dict().values():
        if tensor.is_floating_point():  # norms and biases differ from those of a new model, too
            tensor.add_(torch.rand_like(tensor) * 0.1)
    model.save_pretrained(folder)
    return {f"{prefix}{key}": value for key, value in model.state_dict().items() if not key.startswith(unused)}


@pytest.mark.parametrize("name", one_of_each(ENCODERS, "ViTModel", "Dinov2Model", "ResNetModel"))
def test_encoder_folder_gets_the_requested_head(name: str, tmp_path: Path) -> None:
    saved = save_encoder(name, tmp_path)
    torch.manual_seed(99)
    before = torch.get_rng_state()
    base, again, other = (load_base(str(tmp_path), num_labels=7, label_names=LABELS, seed=seed) for seed in (3, 3, 4))
    assert torch.equal(torch.get_rng_state(), before)
    state = base.model.model.state_dict()
    assert saved.keys() <= state.keys()
    assert [key for key in saved if not torch.equal(saved[key], state[key])] == []
    new = {
        key: value for key, value in state.items() if key not in saved and not key.endswith(("ing_mean", "ing_var"))
    }
    assert any(value.shape[:1] == (7,) for value in new.values())
    assert_same(weights(base.model), weights(again.model))
    drawn = [key for key, value in new.items() if value.unique().numel() > 1]
    assert drawn and not any(torch.equal(new[key], other.model.model.state_dict()[key]) for key in drawn)
    assert base.model.config.id2label == dict(enumerate(LABELS)) and base.model.config.source["num_labels"] == 7
    images = torch.randn(2, *base.model.config.image_size)
    assert output_of(base.model, images).shape == (2, 7) and output_of(base.model, images).isfinite().all()


def test_head_of_two_labels_is_drawn_from_seed(tmp_path: Path) -> None:
    save_encoder("ViTModel", tmp_path)  # transformers itself would add a head of two labels
    first, second = (load_base(str(tmp_path), num_labels=2, seed=5).model for _ in range(2))
    assert_same(weights(first), weights(second))


@pytest.mark.parametrize("name", one_of_each(ENCODERS, "ViTModel", "Dinov2Model", "ResNetModel"))
def test_encoder_folder_alone_names_num_labels(name: str, tmp_path: Path) -> None:
    save_encoder(name, tmp_path)
    assert "prune.num_labels" in refused(str(tmp_path))


def test_new_head_is_announced_in_one_line(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    save_encoder("Dinov2Model", tmp_path)
    with caplog.at_level(logging.INFO, "isoprune_hf"):
        load_base(str(tmp_path), num_labels=7)
    (line,) = [record.getMessage() for record in caplog.records if record.name.startswith("isoprune_hf")]
    assert "7" in line and "new" in line and "\n" not in line


@pytest.mark.parametrize("name", ["CLIPVisionModel", "SiglipVisionModel"])
def test_tower_without_classifier_class_is_refused(name: str, tmp_path: Path) -> None:
    config = {"CLIPVisionModel": transformers.CLIPVisionConfig, "SiglipVisionModel": transformers.SiglipVisionConfig}
    getattr(transformers, name)(config[name](**TOWER)).save_pretrained(tmp_path)
    assert config[name].model_type in refused(str(tmp_path), num_labels=7)


def test_encoder_with_missing_layer_is_refused(tmp_path: Path) -> None:
    save_encoder("ViTModel", tmp_path)
    file = tmp_path / "model.safetensors"
    lost = {key: value for key, value in load_file(file).items() if ".1." not in key}
    assert len(lost) < len(load_file(file))
    save_file(lost, file, {"format": "pt"})
    assert "vit.layers.1." in refused(str(tmp_path), num_labels=7)


def test_head_with_one_missing_tensor_is_refused(tmp_path: Path) -> None:
    transformers.ViTForImageClassification(TRANSFORMERS["hf-vit"]).save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    save_file(
        {key: value for key, value in load_file(file).items() if key != "classifier.bias"}, file, {"format": "pt"}
    )
    assert "classifier.bias" in refused(str(tmp_path), num_labels=7)


def test_encoder_of_another_part_is_refused(tmp_path: Path) -> None:
    config, _, _ = ENCODERS["CLIPModel"]
    config.save_pretrained(tmp_path)
    model = transformers.CLIPModel(config)
    text = {key: value for key, value in model.state_dict().items() if key.startswith("text_model.")}
    save_file(text, tmp_path / "model.safetensors", {"format": "pt"})
    assert "vision_model." in refused(str(tmp_path), num_labels=7)


def test_encoder_in_bfloat16_opens_in_bfloat16(tmp_path: Path) -> None:
    saved = save_encoder("ViTModel", tmp_path, torch.bfloat16)
    state = load_base(str(tmp_path), num_labels=7).model.model.state_dict()
    assert {value.dtype for value in state.values()} == {torch.bfloat16}
    assert all(torch.equal(saved[key], state[key]) for key in saved)


def test_encoder_without_named_architecture_opens(tmp_path: Path) -> None:
    saved = save_encoder("BeitModel", tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config.pop("architectures") == ["BeitModel"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    state = load_base(str(tmp_path), num_labels=7).model.model.state_dict()
    assert all(torch.equal(saved[key], state[key]) for key in saved)


def test_encoder_on_the_hub_opens_from_cache(offline: Path, tmp_path: Path) -> None:
    saved = save_encoder("Dinov2Model", tmp_path / "encoder")
    put_in_cache(offline, "someone/dinov2", tmp_path / "encoder")
    state = load_base("someone/dinov2", num_labels=7).model.model.state_dict()
    assert all(torch.equal(saved[key], state[key]) for key in saved)


def save_timm_encoder(folder: Path, form: str) -> dict[str, torch.Tensor]:
    """Write the folder of an encoder of timm as timm or transformers writes it; return its tensors."""
    torch.manual_seed(8)
    if form == "timm":
        model: nn.Module = timm.create_model("vit_tiny_patch16_224", num_classes=0, **VIT)
        config = {"num_classes": 0}
        timm.models.save_for_hf(model, folder, model_args=VIT, model_config=config, safe_serialization=True)
        return dict(model.state_dict())
    labels = {"num_labels": 0} if form == "wrapper without labels" else {}
    config = TimmWrapperConfig(architecture="vit_tiny_patch16_224", model_args=VIT, **labels)
    wrapped = TimmWrapperModel(config)
    wrapped.save_pretrained(folder)
    return dict(wrapped.timm_model.state_dict())


FORMS = ("timm", "wrapper", "wrapper without labels")


@pytest.mark.parametrize("form", FORMS)
def test_timm_encoder_folder_gets_the_requested_head(form: str, tmp_path: Path) -> None:
    saved = save_timm_encoder(tmp_path, form)
    base, again = (load_base(str(tmp_path), num_labels=7, label_names=LABELS, seed=3) for _ in range(2))
    state = base.model.model.state_dict()
    assert state.keys() - saved.keys() == {"head.weight", "head.bias"} and state["head.weight"].shape == (7, 32)
    assert all(torch.equal(saved[key], state[key]) for key in saved)
    assert_same(weights(base.model), weights(again.model))
    assert base.model.config.id2label == dict(enumerate(LABELS)) and base.model.config.source["num_labels"] == 7


@pytest.mark.parametrize("form", FORMS)
def test_timm_encoder_folder_alone_names_num_labels(form: str, tmp_path: Path) -> None:
    save_timm_encoder(tmp_path, form)
    assert "prune.num_labels" in refused(str(tmp_path))


@pytest.mark.parametrize("form", FORMS)
def test_timm_encoder_with_missing_layer_is_refused(form: str, tmp_path: Path) -> None:
    save_timm_encoder(tmp_path, form)
    file = tmp_path / "model.safetensors"
    save_file({key: value for key, value in load_file(file).items() if "blocks.1." not in key}, file, {"format": "pt"})
    assert "blocks.1." in refused(str(tmp_path), num_labels=7)


def calibration(base: BaseModel) -> list[tuple[torch.Tensor, torch.Tensor]]:
    images = torch.randn(16, *base.model.config.image_size, generator=torch.Generator().manual_seed(1))
    return [(images[:8], torch.arange(8) % 7), (images[8:], torch.arange(8) % 7)]


PRUNED = one_of_each(["Dinov2Model"])
PRUNED += one_of_each(["SwinModel", "ViTModel", "BeitModel", "ResNetModel"], mark="faults")


@pytest.mark.parametrize("name", PRUNED)
def test_encoder_with_new_head_is_pruned(name: str, tmp_path: Path) -> None:
    save_encoder(name, tmp_path / "encoder")
    base = load_base(str(tmp_path / "encoder"), num_labels=7)
    result = prune_model(base.model, PruneRecipe(preset="best", target_macs="60%"), calibration(base))
    assert result.pruned_cost.macs <= 0.6 * result.base_cost.macs
    result.save(tmp_path / "pruned", base.processor)
    images = seeded_images(base)
    again = load_base(str(tmp_path / "pruned")).model
    assert torch.equal(output_of(again, images), output_of(result.model, images))


def test_source_with_new_head_opens_again(tmp_path: Path) -> None:
    save_encoder("ViTModel", tmp_path / "encoder")
    base = load_base(str(tmp_path / "encoder"), num_labels=7, label_names=LABELS, seed=3)
    save_model_folder(tmp_path / "saved", base.model, base.processor)
    saved = load_base(str(tmp_path / "saved")).model
    (tmp_path / "encoder").rename(tmp_path / "moved")
    again = open_source(saved, str(tmp_path / "moved"))
    assert_same(weights(again.model), weights(base.model))


def options_of(**options: Any) -> dict[str, Any]:
    return {"pretrained": False, "model_args": {"depth": 1, "embed_dim": 24, "num_heads": 2}, **options}


def test_encoder_of_timm_without_head_class_is_refused() -> None:
    assert "deepseek_vit_412m_enc" in refused("timm/deepseek_vit_412m_enc", **options_of(num_labels=7))
