"""The image processor of each kind of base: it gives the pixels of the base's own evaluation transform."""

import copy
import math
import os
from pathlib import Path
from typing import Any

from PIL import Image
from torchvision.transforms._presets import ImageClassification
from transformers import AutoImageProcessor, BaseImageProcessor, PreTrainedConfig, ViTImageProcessor
from transformers.models.auto.image_processing_auto import IMAGE_PROCESSOR_MAPPING

from isoprune_hf.checkpoint.dense import LIBRARY_ERRORS, describe_error
from isoprune_hf.checkpoint.modeling_isoprune import IsoImageProcessor
from isoprune_hf.errors import CheckpointError, RecipeError, UnsupportedArchitectureError
from isoprune_hf.recipes import Interpolation

_RESAMPLE = {"nearest": 0, "lanczos": 1, "bilinear": 2, "bicubic": 3, "box": 4, "hamming": 5}


def timm_processor(data: dict[str, Any]) -> IsoImageProcessor:
    """Build the processor of a timm data config.

    Raises:
        UnsupportedArchitectureError: The transform is none that the processor can give exactly.
    """
    _, height, width = data["input_size"]
    if height != width or data["crop_mode"] not in ("center", "squash"):
        raise UnsupportedArchitectureError(
            f"evaluation transforms with crop mode {data['crop_mode']!r} and images of {height} x {width} are not "
            "supported"
        )
    if data["interpolation"] not in _RESAMPLE:
        raise UnsupportedArchitectureError(f"interpolation {data['interpolation']!r} is not supported")
    scaled = math.floor(height / data["crop_pct"])
    size = {"shortest_edge": scaled} if data["crop_mode"] == "center" else {"height": scaled, "width": scaled}
    return _processor(size, height, _RESAMPLE[data["interpolation"]], data["mean"], data["std"])


def torchvision_processor(transform: ImageClassification) -> IsoImageProcessor:
    """Build the processor of a torchvision preset."""
    size, crop = {"shortest_edge": transform.resize_size[0]}, transform.crop_size[0]
    return _processor(size, crop, _RESAMPLE[transform.interpolation.value], transform.mean, transform.std)


def transformers_processor(name: str, config: PreTrainedConfig) -> BaseImageProcessor:
    """Open the processor of a transformers model; where only a config lies, the default of its kind and size.

    Raises:
        CheckpointError: There is one, but it cannot be opened.
    """
    if not os.path.isdir(name) or (Path(name) / "preprocessor_config.json").exists():
        try:
            return saved_processor(name)
        except CheckpointError:
            if os.path.isdir(name):
                raise
    height, width = _config_size(config) or (224, 224)
    kind = ViTImageProcessor  # resizes and normalises: for a type that has none of its own
    if type(config) in IMAGE_PROCESSOR_MAPPING:
        kind = IMAGE_PROCESSOR_MAPPING[type(config)]["torchvision"]
    is_edge = "shortest_edge" in (getattr(kind, "size", None) or {})
    size = {"shortest_edge": min(height, width)} if is_edge else {"height": height, "width": width}
    return kind(size=size, crop_size={"height": height, "width": width})


def saved_processor(name: str) -> BaseImageProcessor:
    """Open the processor of a folder or a Hub id.

    Raises:
        CheckpointError: There is none, or it is damaged.
    """
    try:
        return AutoImageProcessor.from_pretrained(name, trust_remote_code=False)
    except (OSError, *LIBRARY_ERRORS) as error:
        raise CheckpointError(
            f"preprocessor_config.json of {name}: no image processor ({describe_error(error)})"
        ) from error


def try_processor(name: str, processor: BaseImageProcessor) -> list[int]:
    """Give (channels, height, width) of the pixels that a processor makes of an image.

    Raises:
        CheckpointError: It makes none.
    """
    sizes = [dict(getattr(processor, part, None) or {}) for part in ("size", "crop_size")]
    numbers = [number for size in sizes for number in size.values() if number is not None]
    try:
        if not all(1 <= number <= 2**14 for number in numbers):
            raise ValueError(f"sizes of {numbers}")
        pixels = processor(Image.new("RGB", (9, 7), "white"), return_tensors="pt").pixel_values
        if pixels.ndim != 4:
            raise ValueError(f"patches of shape {list(pixels.shape)}, not images of (1, channels, height, width)")
        if not pixels.isfinite().all():
            raise ValueError("values that are not finite")
        _, channels, height, width = pixels.shape
    except LIBRARY_ERRORS as error:
        raise CheckpointError(
            f"preprocessor_config.json of {name}: makes no pixels ({describe_error(error)})"
        ) from error
    return [channels, height, width]


def set_transform(
    processor: BaseImageProcessor, *, resize: int | None = None, interpolation: Interpolation | None = None
) -> BaseImageProcessor:
    """Give a processor another resize before its centre crop, or another interpolation; its pixels keep their size.

    Args:
        processor: It is left untouched.
        resize: Pixels of the shorter side after the resize. With it the transform is that of torchvision on PIL
            images, also where the processor had another one.
        interpolation: Of the resize.

    Returns:
        The same object where nothing changes.

    Raises:
        RecipeError: The resize is smaller than the crop.
    """
    if interpolation is not None and _RESAMPLE[interpolation] != processor.resample:
        processor = copy.deepcopy(processor)
        processor.resample = _RESAMPLE[interpolation]
    if resize is None:
        return processor
    _, height, width = try_processor("the model", processor)
    if resize < max(height, width):
        raise RecipeError(
            f"data.resize must be at least the {max(height, width)} pixels that the model takes, got {resize}"
        )
    size, crop = {"shortest_edge": resize}, {"height": height, "width": width}
    if isinstance(processor, IsoImageProcessor) and (_plain(processor.size), _plain(processor.crop_size)) == (
        size,
        crop,
    ):
        return processor
    kept = ("resample", "do_rescale", "rescale_factor", "do_normalize", "image_mean", "image_std")
    return IsoImageProcessor(size=size, crop_size=crop, **{name: getattr(processor, name) for name in kept})


def _plain(size: Any) -> dict[str, int]:
    return {name: number for name, number in dict(size).items() if number is not None}


def transformers_image_size(config: PreTrainedConfig, processor: BaseImageProcessor) -> list[int]:
    """Return (channels, height, width) of the pixels that a transformers model takes."""
    named = _config_size(config)
    if named is None:
        size = processor.crop_size if getattr(processor, "do_center_crop", False) else processor.size
        side = size.get("height") or size.get("shortest_edge")
        named = (side, size.get("width") or side)
    return [getattr(config, "num_channels", 3), *named]


def _config_size(config: PreTrainedConfig) -> tuple[int, int] | None:
    """Return (height, width) of the images that a config names; None where it names none."""
    vision = getattr(config, "vision_config", None)  # of two towers, images go to this one
    side = getattr(config, "image_size", getattr(vision, "image_size", None))
    height, width = (side, side) if side is None or isinstance(side, int) else side
    return None if side is None else (height, width)


def _processor(size: dict[str, int], crop: int, resample: int, mean: tuple, std: tuple) -> IsoImageProcessor:
    return IsoImageProcessor(
        size=size,
        crop_size={"height": crop, "width": crop},
        resample=resample,
        image_mean=list(mean),
        image_std=list(std),
    )
