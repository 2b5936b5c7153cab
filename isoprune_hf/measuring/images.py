"""Random images and copies of models, which a measurement runs: `draw_images`, `in_dtype`."""

import copy
from collections.abc import Sequence

import torch
from torch import nn

from isoprune_hf.recipes.values import DType

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def draw_images(model: nn.Module, image_size: Sequence[int], batch_size: int) -> torch.Tensor:
    """Return random images (B, C, H, W) on the device and in the dtype of a model, the same ones on every call."""
    pixels = torch.randn(batch_size, *image_size, generator=torch.Generator().manual_seed(0))
    return pixels.to(next(model.parameters()))


def in_dtype(model: nn.Module, dtype: DType | None) -> nn.Module:
    """Return a model itself if it has a dtype, and a copy in this dtype otherwise; None is the model's own."""
    if dtype is None or next(model.parameters()).dtype == _DTYPES[dtype]:
        return model
    return nn.Module.to(copy.deepcopy(model), _DTYPES[dtype])  # transformers wraps its own `to` without types
