"""From an image to the pixel values of the model's image processor.

`evaluation_transform` returns a transform that only resizes and crops uint8 pixels; `normalised` then normalises a
whole batch on the model's device. With the decoder `pil` the values are exactly those of the processor: where they
would not be, the transform is the processor's own.
"""

import copy
import random
from collections.abc import Callable
from typing import Any, Protocol, TypeVar, cast

import torch
from PIL import Image
from timm.data.transforms import RandomResizedCropAndInterpolation
from torch import Tensor
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional
from transformers import BaseImageProcessor
from transformers.image_processing_backends import TorchvisionBackend
from transformers.image_utils import SizeDict

from isoprune_hf.checkpoint.image_processor import IsoImageProcessor, channels_of, layout_of
from isoprune_hf.data.decoding import PILLOW_CHANNELS, Decoding, to_pixels
from isoprune_hf.errors import RecipeError

Pixels = TypeVar("Pixels", Image.Image, Tensor)
Transform = Callable[[Image.Image | Tensor], Tensor]
# Modes in which torchvision scales tensors as Pillow scales images; its `nearest` selects other pixels.
_MODES = {
    Image.Resampling.BILINEAR: InterpolationMode.BILINEAR,
    Image.Resampling.BICUBIC: InterpolationMode.BICUBIC,
    Image.Resampling.LANCZOS: InterpolationMode.LANCZOS,
}


class ProcessorSettings(Protocol):
    """Settings that the image processors of transformers have in common."""

    resample: Image.Resampling | None
    do_resize: bool
    size: SizeDict
    do_center_crop: bool
    crop_size: SizeDict
    do_rescale: bool
    rescale_factor: float
    do_normalize: bool
    image_mean: tuple[float, ...]
    image_std: tuple[float, ...]


def settings_of(processor: BaseImageProcessor) -> ProcessorSettings:
    """Return the processor, typed by its settings: transformers declares them on no common base class."""
    return cast(ProcessorSettings, processor)


class EvaluationTransform:
    """The processor's own transform for one image; a class, because loader processes pickle it."""

    def __init__(self, processor: BaseImageProcessor):
        self.processor = processor

    def __call__(self, image: Image.Image | Tensor) -> Tensor:
        """Return pixel values of shape (C, H, W)."""
        images: Any = [image]  # transformers annotates no list of a union
        made = self.processor(images, return_tensors="pt", input_data_format=layout_of(image))
        pixel_values: Tensor = made["pixel_values"][0]
        return pixel_values


class PixelTransform:
    """The processor's resize and crop on uint8 pixels, without its normalisation.

    The result differs from the values that the processor normalises by at most 1 of 255, at sharp edges by 2.

    Raises:
        RecipeError: torchvision cannot scale tensors in the processor's interpolation mode.
    """

    def __init__(self, processor: BaseImageProcessor):
        self.processor = processor
        resample = settings_of(processor).resample
        is_own = isinstance(processor, IsoImageProcessor) and resample in _MODES
        if not is_own and not isinstance(processor, TorchvisionBackend):
            raise RecipeError(
                f"data.decoder torchvision: {type(processor).__name__} with resample {resample} has no transform on "
                "tensors; set data.decoder: pil"
            )

    def __call__(self, image: Image.Image | Tensor) -> Tensor:
        """Return uint8 pixels of shape (C, H, W) for an image or its pixels (C, H, W)."""
        pixels, processor = to_pixels(image), self.processor
        if isinstance(processor, TorchvisionBackend):
            made = processor(
                [pixels],
                return_tensors="pt",
                do_rescale=False,
                do_normalize=False,
                input_data_format=layout_of(pixels),
            )
            scaled: Tensor = made["pixel_values"][0]
            return scaled
        return _resize_and_crop(pixels, settings_of(processor))


class PillowTransform:
    """The processor's resize and crop by Pillow, without its normalisation; for processors of `is_exact`.

    The processor converts an image to an array and back around its resize, and makes float64 of its pixels: Pillow
    alone takes two thirds of the time for the same pixels.
    """

    def __init__(self, processor: BaseImageProcessor):
        self.processor = processor

    def __call__(self, image: Image.Image | Tensor) -> Tensor:
        """Return uint8 pixels of shape (C, H, W)."""
        settings = settings_of(self.processor)
        if isinstance(image, Tensor):
            return _resize_and_crop(image, settings)
        return to_pixels(_resize_and_crop(image, settings))

    @staticmethod
    def is_exact(processor: BaseImageProcessor) -> bool:
        """Return whether the pixels, after `normalised`, are the values of a processor bit for bit.

        An image that is smaller than its crop gets a border, which processors place in their own way.
        """
        if not isinstance(processor, IsoImageProcessor) or channels_of(processor) not in PILLOW_CHANNELS:
            return False
        if not _fills_its_crop(settings_of(processor)):
            return False
        levels = torch.arange(256, dtype=torch.uint8).reshape(1, 16, 16).repeat(channels_of(processor), 1, 1)
        images: Any = [levels]  # transformers annotates no list of a union
        made = processor(
            images, return_tensors="pt", do_resize=False, do_center_crop=False, input_data_format=layout_of(levels)
        )
        return torch.equal(made["pixel_values"], normalised(levels[None], processor))


def _fills_its_crop(settings: ProcessorSettings) -> bool:
    """Return whether Pillow and torchvision know the resize, and every resized image is as large as the crop."""
    size, crop = settings.size, settings.crop_size
    if not settings.do_resize or settings.resample not in _MODES or size.longest_edge:
        return not (settings.do_resize or settings.do_center_crop)
    height, width = (size.shortest_edge or size.height or 0), (size.shortest_edge or size.width or 0)
    return not settings.do_center_crop or (height >= (crop.height or 0) and width >= (crop.width or 0))


def _resize_and_crop(pixels: Pixels, settings: ProcessorSettings) -> Pixels:
    """Scale and crop an image, or its pixels (C, H, W), as an `IsoImageProcessor` does."""
    if settings.do_resize:
        size = settings.size
        sides = [size.shortest_edge] if size.shortest_edge else [size.height, size.width]
        mode = _MODES[Image.Resampling.BILINEAR if settings.resample is None else settings.resample]
        pixels = functional.resize(pixels, sides, interpolation=mode, antialias=True)
    if settings.do_center_crop:
        pixels = functional.center_crop(pixels, [settings.crop_size.height, settings.crop_size.width])
    return pixels


class RandomCrop:
    """timm's random crop on uint8 pixels: the same random numbers, without timm's conversion of tensors to float."""

    def __init__(self, crop: RandomResizedCropAndInterpolation):
        self.crop = crop

    def __call__(self, pixels: Tensor) -> Tensor:
        """Return a random crop of pixels (C, H, W), scaled to the size of the transform."""
        crop = self.crop
        top, left, height, width = crop.get_params(pixels, crop.scale, crop.ratio)  # type: ignore[no-untyped-call]  # timm
        mode = random.choice(crop.interpolation) if isinstance(crop.interpolation, tuple) else crop.interpolation
        # A copy with the pixels in the order of a whole image: resizing it takes half the time.
        rows = pixels.movedim(0, -1)[top : top + height, left : left + width].contiguous()
        resized: Tensor = functional.resize(rows.movedim(-1, 0), list(crop.size), interpolation=mode, antialias=True)
        return resized


def evaluation_transform(processor: BaseImageProcessor, decoding: Decoding) -> Transform:
    """Return the evaluation transform for the output of the decoder; `normalised` completes it.

    A processor that keeps the aspect ratio of images, and crops none, makes images of its size: they form batches.
    """
    processor = of_one_size(processor)
    if decoding.decoder == "torchvision":
        return PixelTransform(processor)
    return PillowTransform(processor) if PillowTransform.is_exact(processor) else EvaluationTransform(processor)


def of_one_size(processor: BaseImageProcessor) -> BaseImageProcessor:
    """Return a processor whose images are all of one size: the same object if it crops, or keeps no aspect ratio.

    Of a processor that names the shortest and the longest edge (DETR), images become squares of the shortest one.
    """
    size = getattr(processor, "size", None)
    has_edges = isinstance(size, SizeDict) and size.shortest_edge and size.longest_edge
    is_cropped = getattr(processor, "do_center_crop", False)
    if not getattr(processor, "keep_aspect_ratio", False) and (not has_edges or is_cropped):
        return processor
    processor = copy.deepcopy(processor)
    if has_edges:
        edge = settings_of(processor).size.shortest_edge
        vars(processor)["size"] = SizeDict(height=edge, width=edge)
    else:
        vars(processor)["keep_aspect_ratio"] = False
    return processor


def normalisation(processor: BaseImageProcessor) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Return the mean and std for pixels scaled to [0, 1] (timm's convention)."""
    settings = settings_of(processor)
    factor = 255 * settings.rescale_factor if settings.do_rescale else 255.0
    mean: tuple[float, ...] = (0.0,) * channels_of(processor)
    std: tuple[float, ...] = (1.0,) * channels_of(processor)
    if settings.do_normalize:
        mean, std = settings.image_mean, settings.image_std
    return tuple(value / factor for value in mean), tuple(value / factor for value in std)


def normalised(pixels: Tensor, processor: BaseImageProcessor) -> Tensor:
    """Return the pixel values of uint8 images (..., C, H, W), on their device; return other types unchanged."""
    if pixels.dtype != torch.uint8:
        return pixels
    mean, std = normalisation(processor)
    shares = pixels.to(torch.float32, memory_format=torch.contiguous_format).div_(255)
    pixel_values: Tensor = functional.normalize(shares, list(mean), list(std))
    return pixel_values
