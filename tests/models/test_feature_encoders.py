"""Encoders open as they are where features are asked for, and only there."""

from pathlib import Path

import pytest
import torch
import transformers
from helpers.bases import refused
from helpers.tiny_models import VIT
from transformers import AutoModel

from isoprune_hf.checkpoint.folder import save_model_folder
from isoprune_hf.checkpoint.task_forms import IMAGE_FEATURE_EXTRACTION, TASK_FORMS
from isoprune_hf.errors import RecipeError
from isoprune_hf.models import load_base

TOWER = {"image_size": 16, "patch_size": 4, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4}
TASK = IMAGE_FEATURE_EXTRACTION.task


@pytest.fixture(params=["Dinov2", "CLIPVision", "SiglipVision"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    torch.manual_seed(0)
    config = getattr(transformers, f"{request.param}Config")(**TOWER)
    getattr(transformers, f"{request.param}Model")(config).save_pretrained(tmp_path / "encoder")
    return tmp_path / "encoder"


def test_encoder_opens_with_its_own_outputs(folder: Path) -> None:
    base = load_base(str(folder), tasks=TASK_FORMS)
    images = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        stock = AutoModel.from_pretrained(folder).eval()(images)
        ours = base.model(images)
    assert [torch.equal(*pair) for pair in zip(ours.outputs, stock.values(), strict=True)] == [True, True]
    assert base.model.config.base["task"] == TASK and base.model.config.source["name"] == str(folder)


def test_saved_encoder_opens_for_its_task_alone(folder: Path, tmp_path: Path) -> None:
    base = load_base(str(folder), tasks=TASK_FORMS)
    save_model_folder(tmp_path / "saved", *base)
    again = load_base(str(tmp_path / "saved"), tasks=TASK_FORMS)
    images = torch.randn(2, 3, 16, 16)
    assert torch.equal(again.model(images).outputs[0], base.model(images).outputs[0])
    assert f"is of the task {TASK}" in refused(str(tmp_path / "saved"))
    with pytest.raises(RecipeError, match="has no head"):
        load_base(str(tmp_path / "saved"), num_labels=3, tasks=TASK_FORMS)


def test_head_that_is_asked_for_is_added(tmp_path: Path) -> None:
    transformers.Dinov2Model(transformers.Dinov2Config(**TOWER)).save_pretrained(tmp_path)
    assert load_base(str(tmp_path), num_labels=3, tasks=TASK_FORMS).model.config.num_labels == 3
    assert "prune.num_labels" in refused(str(tmp_path))  # where features are not asked for


def test_classifier_stays_a_classifier(tmp_path: Path) -> None:
    transformers.Dinov2ForImageClassification(transformers.Dinov2Config(**TOWER, num_labels=3)).save_pretrained(
        tmp_path
    )
    assert "task" not in load_base(str(tmp_path), tasks=TASK_FORMS).model.config.base


def test_encoder_without_pooler_opens_as_published(tmp_path: Path) -> None:
    torch.manual_seed(0)
    published = transformers.ViTModel(transformers.ViTConfig(**TOWER), add_pooling_layer=False).eval()
    published.save_pretrained(tmp_path / "encoder")
    base = load_base(str(tmp_path / "encoder"), tasks=TASK_FORMS)
    images = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        wanted = published(images).last_hidden_state
        assert [torch.equal(value, wanted) for value in base.model(images).outputs] == [True]
    save_model_folder(tmp_path / "saved", *base)
    again, info = AutoModel.from_pretrained(tmp_path / "saved", output_loading_info=True)
    assert not any(info.values()) and [*again(images)] == ["last_hidden_state"]
    assert torch.equal(again.eval()(images).last_hidden_state, wanted)


def test_other_missing_weights_are_named(tmp_path: Path) -> None:
    encoder = transformers.ViTModel(transformers.ViTConfig(**TOWER))
    state = {name: value for name, value in encoder.state_dict().items() if not name.startswith("layernorm")}
    encoder.save_pretrained(tmp_path, state_dict=state)
    with pytest.raises(RecipeError, match=r"no trained weights for layernorm\.bias"):
        load_base(str(tmp_path), tasks=TASK_FORMS)


def test_pretrained_network_opens_as_its_encoder(tmp_path: Path) -> None:
    torch.manual_seed(0)
    network = transformers.BeitForMaskedImageModeling(transformers.BeitConfig(**TOWER, vocab_size=8)).eval()
    network.save_pretrained(tmp_path)
    base = load_base(str(tmp_path), tasks=TASK_FORMS)
    images = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        wanted = network.beit(images).last_hidden_state
        assert [torch.equal(value, wanted) for value in base.model(images).outputs] == [True]


def test_backbone_is_refused_by_name(tmp_path: Path) -> None:
    transformers.Dinov2Backbone(transformers.Dinov2Config(**TOWER)).save_pretrained(tmp_path)
    with pytest.raises(RecipeError, match="is a Dinov2Backbone"):
        load_base(str(tmp_path), tasks=TASK_FORMS)


def test_encoder_of_text_is_refused(tmp_path: Path) -> None:
    config = transformers.BertConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8)
    transformers.BertModel(config).save_pretrained(tmp_path)
    with pytest.raises(RecipeError, match="not an image classifier"):
        load_base(str(tmp_path), tasks=TASK_FORMS)


def test_timm_encoder_opens_by_name() -> None:
    args = {**VIT, "init_values": None}
    name = "timm/vit_small_patch14_dinov2"
    assert "prune.num_labels" in refused(name, pretrained=False, model_args=args)
    base = load_base(name, pretrained=False, model_args=args, tasks=TASK_FORMS)
    assert base.model.model.num_classes == 0 and base.model.config.base["task"] == TASK
    assert base.model(torch.randn(2, 3, 16, 16)).outputs[0].shape == (2, 32)
