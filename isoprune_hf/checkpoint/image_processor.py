# Copyright 2026 the isoprune_hf authors. Licensed under the Apache License, Version 2.0.
"""The image processor of timm and torchvision models, and the channels of images (part of the shipped file).

A model reads images of `config.image_size[0]` channels, and the mean and std of its processor have as many entries:
`channels_of` returns their number. Images of one channel are grey, of three RGB, of four RGBA; arrays can have any
number of channels.
"""

from typing import Any

import numpy as np
from PIL import Image
from transformers import BaseImageProcessor
from transformers.image_processing_backends import PilBackend

from isoprune_hf.errors import ImageError
from isoprune_hf.limits import MAX_IMAGE_PIXELS

_RGB = 3
_MODES = {1: "L", _RGB: "RGB", 4: "RGBA"}  # number of channels -> mode of Pillow


def check_pixels(width: int, height: int, edge: int | None = None) -> None:
    """Refuse an image of too many pixels, as stored or after its resize: a file of a few bytes can make billions.

    Args:
        width: Columns of the image.
        height: Rows of the image.
        edge: Length of the shorter side after a resize that keeps the shape of the image; None without one.

    Raises:
        ImageError: The image has no pixel or more than `MAX_IMAGE_PIXELS`.
    """
    short, long = min(width, height), max(width, height)
    resized = 0 if edge is None or not short else edge * (edge * long // short)
    if not short or max(width * height, resized) > MAX_IMAGE_PIXELS:
        grown = f", {resized:,} after the resize of its shorter side to {edge}" if resized > width * height else ""
        raise ImageError(f"image of {width} x {height} pixels{grown}: the limit is {MAX_IMAGE_PIXELS:,} pixels")


def shorter_edge(processor: BaseImageProcessor) -> int | None:
    """Return the length to which a processor resizes the shorter side of an image; None if it sets both sides."""
    size = dict(getattr(processor, "size", None) or {})
    keeps_size = not getattr(processor, "do_resize", False) or size.get("longest_edge")
    return None if keeps_size else size.get("shortest_edge")


def channels_of(processor: BaseImageProcessor) -> int:
    """Return the number of channels of a processor's images: the length of its mean, or 3 if that is no sequence."""
    mean = getattr(processor, "image_mean", None)
    return len(mean) if isinstance(mean, list | tuple) else _RGB


def convert_image(image: Image.Image, channels: int) -> Image.Image:
    """Return an image in grey, RGB or RGBA.

    Raises:
        ImageError: There is no such conversion: only arrays have other numbers of channels, and an image without
            transparency is not made opaque, because four channels may also be other measurements than RGBA.
    """
    mode = _MODES.get(channels)
    if mode is None or (mode == "RGBA" and not image.has_transparency_data):
        raise ImageError(
            f"the model reads images of {channels} channels, this one has {len(image.getbands())} ({image.mode}); use "
            f"arrays of shape [{channels}, height, width]"
        )
    return image.convert(mode)


def layout_of(image: Any) -> str | None:
    """Return the `input_data_format` for a processor: of an array, that its first axis is the channels."""
    return None if isinstance(image, Image.Image) else "channels_first"


def channels_first(array: np.ndarray, channels: int, *, layout: Any = None) -> np.ndarray:
    """Return an array (C, H, W), (H, W, C) or, for one channel, (H, W) as (C, H, W).

    Args:
        array: The image.
        channels: Number of channels C.
        layout: "channels_last" if the first axis is not the channels; otherwise it is, if it has their number.

    Raises:
        ImageError: The array has another number of channels.
    """
    if array.ndim == 2 and channels == 1:
        return array[None]
    if array.ndim == 3 and array.shape[0] == channels and layout != "channels_last":
        return array
    if array.ndim == 3 and array.shape[-1] == channels:
        return np.moveaxis(array, -1, 0)
    found = f"this one is an array of shape {list(array.shape)}"
    raise ImageError(f"the model reads images of {channels} channels, {found}")


class IsoImageProcessor(PilBackend):
    """Image processor that reproduces the evaluation transforms of timm and torchvision exactly.

    It differs from the processors of transformers in the centre crop, which rounds half to even as in torchvision, and
    in that it makes images of as many channels as its mean has entries. The channels of an image that is not RGB are
    resized independently: Pillow would weight the channels of RGBA by the last one.
    """

    size, crop_size = {"shortest_edge": 256}, {"height": 224, "width": 224}
    resample, default_to_square = 3, False
    image_mean, image_std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    do_convert_rgb = do_resize = do_center_crop = do_rescale = do_normalize = True

    def to_dict(self) -> dict[str, Any]:
        values: dict[str, Any] = super().to_dict()
        del values["image_processor_type"]
        return values

    def process_image(self, image: Any, *args: Any, **kwargs: Any) -> np.ndarray:
        channels = channels_of(self)
        if channels == _RGB:
            processed: np.ndarray = super().process_image(image, *args, **kwargs)
            return processed
        if isinstance(image, Image.Image):
            check_pixels(*image.size)
            array = np.asarray(convert_image(image, channels))
            return array[None] if channels == 1 else np.moveaxis(array, -1, 0)
        return channels_first(np.asarray(image), channels, layout=kwargs.get("input_data_format"))

    def convert_to_rgb(self, image: Any, input_data_format: Any = None) -> Any:
        if isinstance(image, Image.Image):
            check_pixels(*image.size)  # the file is decoded by `convert`, not before
            return np.array(image.convert("RGB"))
        return super().convert_to_rgb(image, input_data_format)

    def resize(self, image: Any, size: Any, **kwargs: Any) -> Any:  # type: ignore[override]  # as in PilBackend
        edge = None if size.longest_edge else size.shortest_edge
        check_pixels(image.shape[-1], image.shape[-2], edge)
        if len(image) == _RGB:
            return super().resize(image, size, **kwargs)
        resize_channel = super().resize
        return np.concatenate([resize_channel(channel, size, **kwargs) for channel in image[:, None]])

    def center_crop(self, image: Any, size: Any, **kwargs: Any) -> Any:  # type: ignore[override]  # as in PilBackend
        height, width = image.shape[-2:]
        if height < size.height or width < size.width:
            return super().center_crop(image, size, **kwargs)
        top, left = round((height - size.height) / 2.0), round((width - size.width) / 2.0)
        return image[..., top : top + size.height, left : left + size.width]
