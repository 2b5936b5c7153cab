"""A tiny ViT cut with images in the shape of ImageNet, which the tests of the command line read."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import datasets
import huggingface_hub
import pytest
from helpers.plain_cut import PLAIN_FLAGS

MODEL_ARGS = {"img_size": 16, "patch_size": 4, "embed_dim": 32, "depth": 2, "num_heads": 2}
VIT = ["--prune.model", "timm/vit_tiny_patch16_224", "--prune.pretrained", "false"]
VIT += ["--prune.model_args", json.dumps(MODEL_ARGS)]
# 13 micro-batches of 3 out of 40 images: two ranks get 7 and 6 of them.
TAYLOR = [*VIT, *PLAIN_FLAGS, "--prune.criterion", "taylor", "--prune.num_labels", "data"]
TAYLOR += ["--prune.calibration_batches", "13", "--prune.batch_size", "3"]


@contextmanager
def offline_on_cpu(cache: Path) -> Iterator[None]:
    """Disable accelerators, the network and progress bars, and use another cache of data sets."""
    were_disabled = datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()  # the command line switches them off before it imports the library
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ACCELERATE_USE_CPU", "true")
        for library in ("HF_DATASETS", "HF_HUB"):
            patch.setenv(f"{library}_DISABLE_PROGRESS_BARS", "1")
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", cache)
        patch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
        patch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
        yield
    if not were_disabled:
        datasets.enable_progress_bars()
