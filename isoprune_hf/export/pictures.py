"""Draw pictures on which an exported model is compared with PyTorch: `draw_pictures`."""

from typing import Any

import numpy as np
from PIL import Image
from transformers import BaseImageProcessor

from isoprune_hf.checkpoint.image_processor import channels_of, convert_image, layout_of
from isoprune_hf.data.pixels import of_one_size

_SIZES = ((500, 375), (375, 500), (320, 240), (400, 400), (640, 427))  # width and height


def draw_pictures(processor: BaseImageProcessor) -> list[np.ndarray]:
    """Return a batch of one picture and a batch of four, the same in every call.

    The contrast of a picture falls with the frequency as it does in photographs.

    Args:
        processor: Turns the pictures into pixels (B, C, H, W), all of one size, see `of_one_size`.
    """
    processor = of_one_size(processor)
    channels = channels_of(processor)
    generator = np.random.default_rng(0)
    pictures = [_draw_picture(generator, width, height, channels) for width, height in _SIZES]
    batches: list[Any] = [pictures[:1], pictures[1:]]  # transformers annotates no list of a union
    layout = layout_of(pictures[0])
    return [
        np.ascontiguousarray(
            processor(batch, return_tensors="np", input_data_format=layout).pixel_values, dtype=np.float32
        )
        for batch in batches
    ]


def _draw_picture(generator: np.random.Generator, width: int, height: int, channels: int) -> Image.Image | np.ndarray:
    """Return an RGB or grey picture, or an array (C, H, W) of uint8 for other numbers of channels."""
    planes = [_draw_plane(generator, width, height) for _ in range(3 if channels == 1 else channels)]
    if channels in (1, 3):
        return convert_image(Image.fromarray(np.stack(planes, axis=-1)), channels)
    return np.stack(planes)


def _draw_plane(generator: np.random.Generator, width: int, height: int) -> np.ndarray:
    """Return one channel (H, W) of uint8: noise of every scale, with an amplitude that halves when the scale does."""
    total = np.zeros((height, width), np.float32)
    for octave in range(2, 8):
        coarse = generator.standard_normal((2**octave, 2**octave)).astype(np.float32)
        total += np.asarray(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)) / 2**octave
    return np.clip(128 + 250 * total, 0, 255).astype(np.uint8)
