"""Random numbers for an image that follow from its pixels alone: `generator_of`."""

import zlib

import torch
from torch import Tensor


def generator_of(image: Tensor) -> torch.Generator:
    """Return a generator for an image, the same for the same pixels wherever it is in a batch or on which rank."""
    pixels = image.detach().cpu().float().contiguous()
    return torch.Generator().manual_seed(zlib.crc32(pixels.numpy().tobytes()))
