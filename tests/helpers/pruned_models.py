"""Models pruned once in a session, and the folders they are saved in."""

from dataclasses import dataclass
from pathlib import Path

import torch
from helpers.marks import one_of_each
from transformers import BaseImageProcessor

from isoprune_hf.checkpoint.modeling_isoprune import IsoPruneForImageClassification

# One of each kind of base; the other families of `tiny_models` are cut in test_cut.
_FAMILIES = ("vit", "deit", "swin", "convnext", "resnet", "mobilenet_v2", "hf-vit", "hf-swin")
SAVED = one_of_each(_FAMILIES, "vit", "swin", "convnext", "resnet", "mobilenet_v2", "hf-vit")
LABELS = {0: "ant", 1: "bee", 2: "cat", 3: "dog", 4: "eel", 5: "fox", 6: "gnu"}


@dataclass(frozen=True, eq=False)
class Pruned:
    """A pruned tiny model, the folder it was saved in, two images and their logits."""

    model: IsoPruneForImageClassification
    processor: BaseImageProcessor
    folder: Path
    images: torch.Tensor
    logits: torch.Tensor
