"""Edited copies of model folders, and comparisons of models opened from them."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.tiny_models import VIT
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    AutoModelForImageClassification,
    ViTConfig,
)

from isoprune_hf.checkpoint.modeling_isoprune import (
    IsoPruneForImageClassification,
)
from isoprune_hf.errors import CheckpointError

WITH_PACKAGE = (IsoPruneForImageClassification, AutoModelForImageClassification)


VIT_BASE = {"library": "timm", "architecture": "vit_tiny_patch16_224", "args": VIT}


HF_VIT = ViTConfig(
    image_size=16, patch_size=4, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64
)


HF_VIT_BASE = {"library": "transformers", "config": HF_VIT.to_diff_dict() | {"model_type": "vit"}}


def tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    return dict(model.named_parameters()) | dict(model.named_buffers())


def assert_same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> None:
    assert first.keys() == second.keys()
    different = [name for name in first if not torch.equal(first[name], second[name])]
    assert different == []


def logits(model: nn.Module, images: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model(images).logits


def config_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "config.json").read_text())


def refused(folder: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        AutoModelForImageClassification.from_pretrained(folder)
    message = str(caught.value)
    assert "\n" not in message
    return message


def edit_weights(folder: Path, edit: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    weights = load_file(folder / "model.safetensors")
    edit(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
