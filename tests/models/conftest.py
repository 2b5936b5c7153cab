"""Folders of transformers models, and a machine without a network."""

import urllib.error
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from helpers.bases import CLASSES
from helpers.tiny_models import TRANSFORMERS
from transformers import (
    BitImageProcessor,
    ConvNextImageProcessor,
    ViTImageProcessor,
)


@pytest.fixture(scope="module")
def transformers_folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Return a function that makes the folder of a family: weights, config with label names, and a processor."""
    root, made = tmp_path_factory.mktemp("transformers"), set()
    processors = {
        "hf-vit": ViTImageProcessor(size={"height": 16, "width": 16}, image_mean=[0.5, 0.4, 0.3], resample=3),
        "hf-deit": ViTImageProcessor(size={"height": 16, "width": 16}, do_normalize=False),
        "hf-swin": BitImageProcessor(size={"shortest_edge": 64}, crop_size={"height": 56, "width": 56}),
        "hf-convnext": ConvNextImageProcessor(size={"shortest_edge": 32}, crop_pct=0.8, resample=2),
        "hf-resnet": ConvNextImageProcessor(size={"shortest_edge": 64}, crop_pct=0.9),
    }

    def give(family: str) -> Path:
        if family not in made:
            torch.manual_seed(4)
            config = type(TRANSFORMERS[family])(
                **{**TRANSFORMERS[family].to_diff_dict(), "id2label": {0: "ant", 1: "bee", 2: "cat"}}
            )
            CLASSES[family](config).save_pretrained(root / family)
            processors[family].save_pretrained(root / family)
            made.add(family)
        return root / family

    return give


@pytest.fixture
def offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Disable the network, and return the path of an empty Hub cache."""

    def refuse(*_: Any, **__: Any) -> Any:
        raise urllib.error.URLError("no network")

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setattr(torch.hub, "urlopen", refuse)
    return tmp_path / "cache"
