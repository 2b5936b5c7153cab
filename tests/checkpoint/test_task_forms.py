"""The task of a config: named in its base, refused if unknown, and opened by the class of that task alone."""

from typing import Any

import pytest
import torch
from transformers import Dinov2Config

from isoprune_hf import IsoPruneConfig, IsoPruneForImageClassification, IsoPruneModel
from isoprune_hf.checkpoint.dense import build_base
from isoprune_hf.checkpoint.pretrained import auto_map_of
from isoprune_hf.checkpoint.task_forms import IMAGE_CLASSIFICATION, IMAGE_FEATURE_EXTRACTION, task_entry, task_of
from isoprune_hf.errors import CheckpointError

TINY = Dinov2Config(image_size=16, patch_size=4, hidden_size=32, num_hidden_layers=1, num_attention_heads=4)


def config_of(task: Any, library: str = "transformers") -> IsoPruneConfig:
    values = TINY.to_diff_dict() | {"model_type": "dinov2"}
    named = {"config": values} if library == "transformers" else {"architecture": "resnet18", "args": {}}
    return IsoPruneConfig(base={"library": library, **named, "task": task}, image_size=[3, 16, 16])


def test_base_without_task_is_a_classifier() -> None:
    assert task_of({"library": "timm"}) is task_of(None) is IMAGE_CLASSIFICATION
    assert task_entry(IMAGE_CLASSIFICATION) == {}  # folders of earlier versions stay as they are


@pytest.mark.parametrize("task", ["text-generation", 5, None, ["image-classification"]])
def test_unknown_task_is_refused_by_name(task: Any) -> None:
    with pytest.raises(CheckpointError, match=r"^config\.base\.task: "), torch.device("meta"):
        build_base(config_of(task))


def test_network_of_features_has_no_head() -> None:
    with torch.device("meta"):
        names = {build_base(config_of(form.task)).__class__.__name__ for form in (IMAGE_FEATURE_EXTRACTION,)}
        assert names == {"Dinov2Model"}
        assert type(build_base(config_of("image-classification"))).__name__ == "Dinov2ForImageClassification"
        assert build_base(config_of(IMAGE_FEATURE_EXTRACTION.task, "timm")).num_classes == 0


def test_library_without_encoders_is_refused() -> None:
    with pytest.raises(CheckpointError, match="torchvision has no networks"), torch.device("meta"):
        build_base(config_of(IMAGE_FEATURE_EXTRACTION.task, "torchvision"))


def test_classifier_class_names_the_auto_class() -> None:
    config = config_of(IMAGE_FEATURE_EXTRACTION.task)
    with pytest.raises(CheckpointError, match=r"open it with AutoModel$"), torch.device("meta"):
        IsoPruneForImageClassification(config)
    with torch.device("meta"):
        assert type(IsoPruneModel(config).model).__name__ == "Dinov2Model"


def test_auto_classes_are_those_of_the_task() -> None:
    classes = auto_map_of(config_of("image-classification"))
    features = auto_map_of(config_of(IMAGE_FEATURE_EXTRACTION.task))
    assert classes.keys() - features.keys() == {"AutoModelForImageClassification"}
    assert features["AutoModel"] == "modeling_isoprune.IsoPruneModel" and features.items() <= classes.items()
