"""Image processors of base models, which reproduce the evaluation transforms of their libraries.

`timm_processor`, `torchvision_processor` and `transformers_processor` build the processor of a base, `with_transform`
changes resize or interpolation.
"""

import copy
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image
from transformers import BaseImageProcessor, PreTrainedConfig, ViTImageProcessor

# Undocumented; as of transformers 5.23: config class -> {"torchvision": class, "pil": class}.
from transformers.models.auto.image_processing_auto import IMAGE_PROCESSOR_MAPPING

from isoprune_hf.checkpoint.dense import LIBRARY_ERRORS, describe_error
from isoprune_hf.checkpoint.image_processor import IsoImageProcessor, channels_of, layout_of
from isoprune_hf.errors import CheckpointError, RecipeError, UnsupportedArchitectureError
from isoprune_hf.limits import MAX_PROCESSED_SIDE
from isoprune_hf.models.channels import fit_channels, fit_values, plain_size
from isoprune_hf.models.identify import BaseSource
from isoprune_hf.models.saved_processor import saved_processor
from isoprune_hf.recipes import Interpolation

_RESAMPLE = {"nearest": 0, "lanczos": 1, "bilinear": 2, "bicubic": 3, "box": 4, "hamming": 5}


class TorchvisionPreset(Protocol):
    """The evaluation transform of torchvision's classification weights."""

    crop_size: list[int]
    resize_size: list[int]
    mean: list[float]
    std: list[float]
    interpolation: Any


def timm_processor(data: dict[str, Any]) -> IsoImageProcessor:
    """Build the processor of a timm data config.

    Raises:
        UnsupportedArchitectureError: The processor cannot reproduce the transform exactly.
    """
    channels, height, width = data["input_size"]
    if height != width or data["crop_mode"] not in ("center", "squash"):
        raise UnsupportedArchitectureError(
            f"evaluation transforms with crop mode {data['crop_mode']!r} and images of {height} x {width} are not "
            "supported"
        )
    if data["interpolation"] not in _RESAMPLE:
        raise UnsupportedArchitectureError(f"interpolation {data['interpolation']!r} is not supported")
    scaled = math.floor(height / data["crop_pct"])
    size = {"shortest_edge": scaled} if data["crop_mode"] == "center" else {"height": scaled, "width": scaled}
    mean, std = (fit_values(data[name], channels) for name in ("mean", "std"))
    return _processor(size, height, _RESAMPLE[data["interpolation"]], mean, std)


def timm_data(processor: IsoImageProcessor) -> dict[str, Any]:
    """Return the data config of timm with the transform of a processor; the inverse of `timm_processor`."""
    crop, size = processor.crop_size, processor.size
    scaled = size.get("shortest_edge") or size["height"]
    return {
        "input_size": (channels_of(processor), crop["height"], crop["width"]),
        "interpolation": next(name for name, number in _RESAMPLE.items() if number == processor.resample),
        "mean": tuple(processor.image_mean),
        "std": tuple(processor.image_std),
        # timm rounds the size before the crop down.
        "crop_pct": crop["height"] / (scaled + 0.5),
        "crop_mode": "center" if "shortest_edge" in size else "squash",
    }


def torchvision_processor(transform: TorchvisionPreset) -> IsoImageProcessor:
    """Build the processor of a torchvision preset."""
    size = {"shortest_edge": transform.resize_size[0]}
    resample = _RESAMPLE[transform.interpolation.value]
    return _processor(size, transform.crop_size[0], resample, transform.mean, transform.std)


def transformers_processor(source: BaseSource, config: PreTrainedConfig) -> BaseImageProcessor:
    """Open the processor of a transformers model; if only a config exists, build the default of its type and size.

    For images that are not RGB, it is fitted to their channels; see `fit_channels`.

    Raises:
        CheckpointError: The saved processor cannot be opened.
        RecipeError: The default cannot be built for the size in the config.
    """
    processor = _saved_or_default(source, config)
    channels = _config_channels(config)
    return processor if channels == 3 else fit_channels(processor, channels)


def _saved_or_default(source: BaseSource, config: PreTrainedConfig) -> BaseImageProcessor:
    place = source.place
    if not os.path.isdir(place) or (Path(place) / "preprocessor_config.json").exists():
        try:
            return saved_processor(place, source.revision)
        except CheckpointError:
            if os.path.isdir(place):
                raise
    height, width = _config_size(config) or (224, 224)
    kind: type[BaseImageProcessor] = ViTImageProcessor  # resizes and normalises: for types without a processor
    if type(config) in IMAGE_PROCESSOR_MAPPING:
        by_backend: Any = IMAGE_PROCESSOR_MAPPING[type(config)]  # annotated as a tuple, but a mapping
        kind = by_backend["torchvision"]
    by_edge = "shortest_edge" in (getattr(kind, "size", None) or {})
    size = {"shortest_edge": min(height, width)} if by_edge else {"height": height, "width": width}
    try:
        return kind(size=size, crop_size={"height": height, "width": width})
    except LIBRARY_ERRORS as error:
        raise RecipeError(
            f"model: no image processor for image_size {[height, width]}: {describe_error(error)}"
        ) from error


def processed_size(name: str, processor: BaseImageProcessor) -> list[int]:
    """Return (channels, height, width) of the images that a processor produces.

    Args:
        name: Name of the model, for error messages.
        processor: Image processor.

    Raises:
        CheckpointError: The processor does not produce finite images.
    """
    complaint = f"preprocessor_config.json of {name}: the processor fails on an image"
    try:
        sizes = [dict(getattr(processor, part, None) or {}) for part in ("size", "crop_size")]
        sides = [side for size in sizes for side in size.values() if side is not None]
        if not all(1 <= side <= MAX_PROCESSED_SIDE for side in sides):
            raise ValueError(f"sizes of {sides}")
        channels = channels_of(processor)
        image: Any = Image.new("RGB", (9, 7), "white") if channels == 3 else np.full((channels, 7, 9), 255, np.uint8)
        made = processor(image, return_tensors="pt", input_data_format=layout_of(image))
        pixels: torch.Tensor = made.pixel_values
    except LIBRARY_ERRORS as error:
        raise CheckpointError(f"{complaint} ({describe_error(error)})") from error
    if pixels.ndim != 4:
        raise CheckpointError(
            f"{complaint} (patches of shape {list(pixels.shape)} instead of images (1, channels, height, width))"
        )
    if not pixels.isfinite().all():
        raise CheckpointError(f"{complaint} (values that are not finite)")
    return list(pixels.shape[1:])


def with_transform(
    processor: BaseImageProcessor,
    *,
    image_size: int | None = None,
    resize: int | None = None,
    interpolation: Interpolation | None = None,
    mean: list[float] | None = None,
    std: list[float] | None = None,
) -> BaseImageProcessor:
    """Return the processor with another size of its output, resize before its centre crop, interpolation, mean or std.

    Args:
        processor: Image processor; left untouched.
        image_size: Side of its output, in pixels; the resize before a crop changes in proportion.
        resize: Length of the shorter side after the resize, in pixels. If given, the result is the transform of
            torchvision on PIL images, even if the processor had another one.
        interpolation: Interpolation of the resize.
        mean: Mean of each channel that is subtracted, of values from 0 to 1.
        std: Number for each channel that the difference is divided by.

    Returns:
        A new processor, or the same object if nothing changes.

    Raises:
        RecipeError: The resize is smaller than the crop, or a channel has no mean or std.
    """
    processor = _with_values(_with_values(processor, "mean", mean), "std", std)
    if image_size is not None:
        processor = _with_side(processor, image_size)
    if interpolation is not None and _RESAMPLE[interpolation] != _setting(processor, "resample"):
        processor = copy.deepcopy(processor)
        vars(processor)["resample"] = _RESAMPLE[interpolation]
    if resize is None:
        return processor
    _, height, width = processed_size("the model", processor)
    if resize < max(height, width):
        raise RecipeError(
            f"data.resize must be at least the image size of the model, {max(height, width)} pixels, got {resize}"
        )
    size = {"shortest_edge": resize}
    crop = {"height": height, "width": width}
    if isinstance(processor, IsoImageProcessor):
        is_same = plain_size(processor.size) == size and plain_size(processor.crop_size) == crop
        if is_same:
            return processor
    kept = ("resample", "do_rescale", "rescale_factor", "do_normalize", "image_mean", "image_std")
    return IsoImageProcessor(size=size, crop_size=crop, **{name: _setting(processor, name) for name in kept})


def _with_side(processor: BaseImageProcessor, side: int) -> BaseImageProcessor:
    """Return the processor with square images of another side; the same object if it makes these."""
    _, height, width = processed_size("the model", processor)
    if height == width == side:
        return processor
    processor = copy.deepcopy(processor)
    for name in ("size", "crop_size"):
        known = plain_size(getattr(processor, name, None))
        scaled = {edge: length * side // min(height, width) for edge, length in known.items()}  # as timm rounds
        if known:
            square = dict.fromkeys(scaled, side) if known == {"height": height, "width": width} else scaled
            vars(processor)[name] = type(_setting(processor, name))(**square)
    return processor


def _with_values(processor: BaseImageProcessor, name: str, values: list[float] | None) -> BaseImageProcessor:
    """Return the processor with another mean or std; the same object if it has these values."""
    if values is None or list(_setting(processor, f"image_{name}") or ()) == values:
        return processor
    channels = channels_of(processor)
    if len(values) != channels:
        raise RecipeError(f"data.{name} must have a number for each of the {channels} channels, got {values}")
    processor = copy.deepcopy(processor)
    vars(processor).update({f"image_{name}": list(values), "do_normalize": True})
    return processor


def _setting(processor: BaseImageProcessor, name: str) -> Any:
    """Return a setting that transformers declares only in the concrete classes."""
    return getattr(processor, name)


def transformers_image_size(config: PreTrainedConfig, processor: BaseImageProcessor) -> list[int]:
    """Return (channels, height, width) of the images that a transformers model takes.

    Raises:
        RecipeError: Neither the config nor the processor has a usable size.
    """
    named = _config_size(config)
    if named is None:
        cropped = getattr(processor, "do_center_crop", False)
        size = plain_size(_setting(processor, "crop_size" if cropped else "size"))
        side = size.get("height") or size.get("shortest_edge")
        if side is None:
            raise RecipeError(
                f"model: no image size in config.json, nor in the image processor: {size}; save one beside the model "
                'that names it, such as ViTImageProcessor(size={"height": 480, "width": 640}, do_normalize=False)'
            )
        named = (side, size.get("width") or side)
    return [_config_channels(config), *named]


def _config_channels(config: PreTrainedConfig) -> int:
    """Return the number of channels of the images in a config; of two towers, the vision tower takes the images."""
    vision = getattr(config, "vision_config", None)
    channels = getattr(config, "num_channels", getattr(vision, "num_channels", 3))
    if type(channels) is not int or channels < 1:
        raise RecipeError(f"model: num_channels in config.json must be a number of channels, got {channels!r:.99}")
    return channels


def _config_size(config: PreTrainedConfig) -> tuple[int, int] | None:
    """Return (height, width) of the images in a config, or None if it has no image size."""
    vision = getattr(config, "vision_config", None)  # of two towers, this one takes the images
    side = getattr(config, "image_size", getattr(vision, "image_size", None))
    if side is None:
        return None
    sides = [side, side] if isinstance(side, int) else side
    if not isinstance(sides, list | tuple) or len(sides) != 2 or not all(isinstance(side, int) for side in sides):
        raise RecipeError(f"model: image_size in config.json must be one or two integers, got {side!r:.99}")
    height, width = sides
    return height, width


def _processor(
    size: dict[str, int], crop: int, resample: int, mean: Sequence[float], std: Sequence[float]
) -> IsoImageProcessor:
    return IsoImageProcessor(
        size=size,
        crop_size={"height": crop, "width": crop},
        resample=resample,
        image_mean=list(mean),
        image_std=list(std),
    )
