"""Pruned folders as a model of timm: `timm.create_model("isoprune", folder="output/pruned")`.

Importing this module enters `isoprune` into timm's registry. As a program it runs a script of timm with it:

    python -m isoprune_hf.models.timm_model validate.py DATA --model isoprune --model-kwargs folder=output/pruned
"""

import runpy
import sys
from typing import Any

import torch
from timm.models import register_model
from torch import nn

from isoprune_hf.checkpoint.image_processor import IsoImageProcessor
from isoprune_hf.checkpoint.modeling_isoprune import IsoPruneForImageClassification
from isoprune_hf.errors import RecipeError
from isoprune_hf.models.processors import timm_data
from isoprune_hf.models.saved_processor import saved_processor

# Arguments that timm's scripts always pass, and that say nothing at these values.
_NOTHING = (None, False, 0, 0.0)


@register_model
def isoprune(
    pretrained: bool = False, *, folder: str, num_classes: int | None = None, in_chans: int = 3, **kwargs: Any
) -> nn.Module:
    """Return the network of a pruned folder whose base is of timm, with the folder's transform as `pretrained_cfg`.

    Args:
        pretrained: Ignored: the weights are those of the folder.
        folder: The folder, or an id of the Hub.
        num_classes: Size of a new head; None or the folder's own keeps the head.
        in_chans: Checked against the folder.
        kwargs: Settings of timm's scripts; only those that change nothing are accepted.

    Raises:
        RecipeError: The base is of another library, or a setting would change the network.
        CheckpointError: The folder is damaged.
    """
    model = IsoPruneForImageClassification.from_pretrained(folder)
    base = model.config.base or {}
    if base.get("library") != "timm":
        raise RecipeError(f"folder: the base of {folder} is of {base.get('library')}, timm's scripts need one of timm")
    channels = (model.config.image_size or [in_chans])[0]
    if in_chans != channels:
        raise RecipeError(f"in_chans: {folder} reads images of {channels} channels, got {in_chans}")
    for name, value in kwargs.items():
        if value not in _NOTHING and not name.startswith(("pretrained_", "cache_")):
            raise RecipeError(f"{name}: the network of a pruned folder is fixed, got {value!r}; leave it out")
    if num_classes not in (None, model.config.num_labels):
        model = IsoPruneForImageClassification.from_pretrained(
            folder, num_labels=num_classes, ignore_mismatched_sizes=True
        )
    network: nn.Module = model.model.requires_grad_(True)
    processor = saved_processor(folder)
    if isinstance(processor, IsoImageProcessor):
        described: Any = {"architecture": "isoprune", "num_classes": model.config.num_labels, **timm_data(processor)}
        network.pretrained_cfg = network.default_cfg = described
    return network.to(torch.float32)


if __name__ == "__main__":
    sys.argv = sys.argv[1:]
    runpy.run_path(sys.argv[0], run_name="__main__")
