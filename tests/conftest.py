"""Models pruned once in a session, and the folders they are saved in."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from helpers.tiny_models import TIMM, make_base, make_images
from transformers import BaseImageProcessor

from isoprune_hf.checkpoint.modeling_isoprune import IsoPruneForImageClassification
from isoprune_hf.models import load_base
from isoprune_hf.pruning.prune import prune_model
from isoprune_hf.recipes import PruneRecipe

# One of each kind of base; the other families of `tiny_models` are cut in test_surgery.
SAVED = ("vit", "deit", "swin", "convnext", "resnet", "mobilenet_v2", "hf-vit", "hf-swin")
LABELS = {0: "ant", 1: "bee", 2: "cat", 3: "dog", 4: "eel", 5: "fox", 6: "gnu"}


@dataclass(frozen=True, eq=False)
class Pruned:
    """A pruned tiny model, the folder it was saved in, and what it says of two images."""

    model: IsoPruneForImageClassification
    processor: BaseImageProcessor
    folder: Path
    images: torch.Tensor
    logits: torch.Tensor


@pytest.fixture(scope="session")
def pruned(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Pruned]:
    """Give the pruned model of a family of `tiny_models`; made when it is first asked for, not to be changed."""
    made: dict[str, Pruned] = {}
    root = tmp_path_factory.mktemp("pruned")

    def give(family: str) -> Pruned:
        if family not in made:
            base = make_base(family, root / "bases", labels=len(LABELS))
            base.config.id2label = LABELS
            base.config.label2id = {name: index for index, name in LABELS.items()}
            name, args = TIMM.get(family, (str(root / "bases" / family), None))
            processor = load_base(name, False, model_args=args).processor
            recipe = PruneRecipe(criterion="l1", ratio=0.4, head_ratio=0.3, head_dim_ratio=0.3, round_to=1)
            result = prune_model(base, recipe)
            result.save(root / family, processor)
            images = make_images(base)
            with torch.no_grad():
                logits = result.model(images).logits
            made[family] = Pruned(result.model, processor, root / family, images, logits)
        return made[family]

    return give
