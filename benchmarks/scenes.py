"""Draw the parts of generated scenes: textures of photographs, and masks of shapes."""

from functools import cache

import numpy as np
from PIL import Image, ImageDraw
from sklearn.datasets import load_sample_images

SHAPES = ("circle", "square", "triangle", "cross")


@cache
def photographs() -> tuple[np.ndarray, ...]:
    """Return the two photographs that scikit-learn ships, (H, W, 3) in uint8."""
    return tuple(load_sample_images().images)


def texture(random: np.random.Generator, side: int) -> Image.Image:
    """Return a random square of a photograph."""
    photos = photographs()
    photo = photos[random.integers(len(photos))]
    top, left = (int(random.integers(size - side)) for size in photo.shape[:2])
    return Image.fromarray(photo[top : top + side, left : left + side])


def shape_mask(shape: str, box: tuple[float, float, float, float], side: int) -> Image.Image:
    """Return a mask of `side` x `side` pixels that is 255 inside a shape.

    Args:
        shape: A name of `SHAPES`.
        box: Its left, top, right and bottom, in pixels.
        side: Side of the image, in pixels.
    """
    left, top, right, bottom = box
    mask = Image.new("L", (side, side))
    pen = ImageDraw.Draw(mask)
    if shape == "circle":
        pen.ellipse(box, fill=255)
    elif shape == "square":
        pen.rectangle(box, fill=255)
    elif shape == "triangle":
        pen.polygon([(left, bottom), (right, bottom), ((left + right) / 2, top)], fill=255)
    else:
        third_x, third_y = (right - left) / 3, (bottom - top) / 3
        pen.rectangle((left + third_x, top, right - third_x, bottom), fill=255)
        pen.rectangle((left, top + third_y, right, bottom - third_y), fill=255)
    return mask
