"""Masks, images with the class of each pixel, in the column `MASK` of a split: `read_mask`."""

import io
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from isoprune_hf.data.decoding import DECODE_ERRORS
from isoprune_hf.errors import DatasetError
from isoprune_hf.limits import MAX_IMAGE_BYTES
from isoprune_hf.plain_files import read_bytes

IGNORED = 255  # the class of 8-bit masks whose pixels are left out, where a config names no other one


def read_mask(stored: Any, *, reduces_labels: bool) -> Tensor:
    """Return the classes of the pixels of a mask, (H, W) in int64.

    Args:
        stored: The mask as `datasets` stores it: `bytes` or the `path` of a file with one channel.
        reduces_labels: The class 0 is left out, and the others count from 1, as in ADE20K.

    Raises:
        DatasetError: The mask is missing, cannot be read, or has several channels.
    """
    if stored is None:
        raise DatasetError(
            "data: an image has no mask; give every image one, of pixels of an ignored class if need be"
        )
    try:
        encoded = read_bytes(stored["path"], MAX_IMAGE_BYTES) if stored["bytes"] is None else stored["bytes"]
        with Image.open(io.BytesIO(encoded)) as opened:
            values = np.array(opened).astype(np.int64)
    except DECODE_ERRORS as error:
        raise DatasetError(f"data: a mask cannot be read: {' '.join(str(error).split())}") from error
    if values.ndim != 2:
        raise DatasetError(
            f"data: a mask has the shape {list(values.shape)}; masks have one channel with the class of each pixel"
        )
    mask = torch.from_numpy(values)
    return torch.where(mask == 0, IGNORED, mask - 1) if reduces_labels else mask
