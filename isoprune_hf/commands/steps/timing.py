"""Device that a benchmark runs on."""

from typing import Literal

import torch

from isoprune_hf.checkpoint.modeling_isoprune import IsoPruneForImageClassification
from isoprune_hf.errors import RecipeError


def choose_device(name: Literal["auto", "cpu", "cuda"]) -> torch.device:
    """Return the device of a name; `auto` is CUDA if this machine has it.

    Raises:
        RecipeError: CUDA is requested and this machine has none.
    """
    has_cuda = torch.cuda.is_available()
    if name == "cuda" and not has_cuda:
        raise RecipeError("--device cuda: this machine has no CUDA device; use --device cpu")
    return torch.device("cuda" if name != "cpu" and has_cuda else "cpu")


def move(model: IsoPruneForImageClassification, device: torch.device) -> IsoPruneForImageClassification:
    """Move a model to a device in place, and return it."""
    model.to(device)  # type: ignore[arg-type]  # transformers 5.23 types `to` as a decorated function without self
    return model
