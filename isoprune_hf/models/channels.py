"""Image processors for other than three channels: `fit_values` for mean and std, `fit_channels` for transformers.

Image processors of transformers are made for RGB: its pipelines turn every file into RGB first, and a mean of three
values makes three channels of one. An `IsoImageProcessor` makes as many channels as its mean has values.
"""

import copy
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from PIL import Image
from transformers import BaseImageProcessor

from isoprune_hf.checkpoint.dense import LIBRARY_ERRORS
from isoprune_hf.checkpoint.image_processor import IsoImageProcessor

_ROUNDING = 2.5  # levels of 255: the two backends of transformers round resized pixels differently
_CROP_SHARE = 224 / 256  # of the resized image that a centre crop keeps, if no setting tells


def fit_values(values: Sequence[float] | float, channels: int) -> list[float]:
    """Return mean or std for a number of channels; values for another number are replaced by their average.

    Source:
        timm.data.loader.adapt_to_chs, by which timm normalises the images of a model with other `in_chans`.
    """
    if isinstance(values, Sequence) and len(values) == channels:
        return list(values)
    return [np.mean(values).item()] * channels


def fit_channels(processor: BaseImageProcessor, channels: int) -> BaseImageProcessor:
    """Return the processor of a transformers model for images of another number of channels than three.

    Args:
        processor: Image processor; left untouched.
        channels: Number of channels of the model's images.

    Returns:
        An `IsoImageProcessor` if one makes the same pixels of an RGB image, up to rounding and a shift of one pixel.
        Otherwise a copy with other mean and std, whose pipelines take only arrays (channels, height, width).
    """
    rgb = _with_channels(processor, 3)
    for candidate in _candidates(rgb):
        if _are_same(candidate, rgb):
            return _with_channels(candidate, channels)
    return _with_channels(processor, channels)


def _with_channels(processor: BaseImageProcessor, channels: int) -> BaseImageProcessor:
    """Return a copy with mean and std for a number of channels, which without normalisation only tell the number."""
    fitted = copy.deepcopy(processor)
    for name, default in (("image_mean", 0.0), ("image_std", 1.0)):
        values = getattr(processor, name, None)
        vars(fitted)[name] = tuple(fit_values(default if values is None else values, channels))
    vars(fitted)["do_convert_rgb"] = isinstance(processor, IsoImageProcessor)
    if hasattr(processor, "do_flip_channel_order"):  # BGR is an order of three channels
        vars(fitted)["do_flip_channel_order"] = False
    return fitted


def _candidates(processor: BaseImageProcessor) -> Iterator[IsoImageProcessor]:
    """Yield processors with the settings of another one and each of the transforms that are common in transformers.

    These are: resize and crop by the settings, a resize to the size of the model, and a centre crop to that size.
    """
    flags = ("do_resize", "do_rescale", "do_normalize")
    settings: dict[str, Any] = {name: bool(getattr(processor, name, None)) for name in flags}
    settings |= {name: getattr(processor, name, None) for name in ("image_mean", "image_std", "rescale_factor")}
    resample = getattr(processor, "resample", None)
    settings["resample"] = Image.Resampling.BILINEAR if resample is None else resample
    size, crop = (plain_size(getattr(processor, name, None)) for name in ("size", "crop_size"))
    is_cropped = bool(getattr(processor, "do_center_crop", None))
    yield IsoImageProcessor(size=size, crop_size=crop or None, do_center_crop=is_cropped, **settings)
    sides = crop if is_cropped else size
    side = sides.get("height") or sides.get("shortest_edge")
    if side is None:
        return
    square = {"height": side, "width": side}
    yield IsoImageProcessor(size=square, do_center_crop=False, **settings)
    for share in (getattr(processor, "crop_pct", None) or _CROP_SHARE, _CROP_SHARE):
        edge = {"shortest_edge": int(side / share)}
        yield IsoImageProcessor(size=edge, crop_size=square, do_center_crop=True, **settings)


def _are_same(candidate: BaseImageProcessor, processor: BaseImageProcessor) -> bool:
    """Return whether two processors make the same pixels of a gradient, up to rounding and a shift of one pixel."""
    rows, columns = np.mgrid[0:90, 0:120]
    levels = np.stack([rows * (255 / 89), columns * (255 / 119), 255 - rows - columns], axis=-1)
    gradient = Image.fromarray(levels.astype(np.uint8))
    try:
        made, expected = (used(gradient, return_tensors="np")["pixel_values"] for used in (candidate, processor))
    except LIBRARY_ERRORS:
        return False  # of a damaged processor; `processed_size` names the fault
    if made.shape != expected.shape:
        return False
    step = 255 / min(expected.shape[-2:])  # levels from one pixel to the next
    return bool(abs(made - expected).max() <= (_ROUNDING + step) * np.ptp(expected) / 255)


def plain_size(size: Any) -> dict[str, int]:
    """Return the sides that a size of transformers sets."""
    return {name: number for name, number in dict(size or {}).items() if number is not None}
