"""From an RGB image to the pixel values of the model's image processor: by the processor itself, or on 8 bits.

On 8 bits the loader only resizes and crops; a batch is normalised where the model is.
"""

import random

import torch
from PIL import Image
from timm.data.transforms import RandomResizedCropAndInterpolation
from torch import Tensor
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional
from transformers import BaseImageProcessor
from transformers.image_processing_backends import TorchvisionBackend

from isoprune_hf.checkpoint.modeling_isoprune import IsoImageProcessor
from isoprune_hf.data.decoding import Decoding, to_pixels
from isoprune_hf.errors import RecipeError

# What torchvision scales tensors by as Pillow does; its `nearest` takes other pixels.
_MODES = {
    Image.Resampling.BILINEAR: InterpolationMode.BILINEAR,
    Image.Resampling.BICUBIC: InterpolationMode.BICUBIC,
    Image.Resampling.LANCZOS: InterpolationMode.LANCZOS,
}


class EvaluationTransform:
    """The processor's own transform for one RGB image; an object, because loader processes pickle it."""

    def __init__(self, processor: BaseImageProcessor):
        self.processor = processor

    def __call__(self, image: Image.Image) -> Tensor:
        """Return pixel values of shape (C, H, W)."""
        return self.processor([image], return_tensors="pt")["pixel_values"][0]


class PixelTransform:
    """Resize and crop of the processor on 8 bits, without its normalisation.

    Of the values from 0 to 255 that the processor normalises, they differ by 1, or at sharp edges by 2.

    Raises:
        RecipeError: The processor scales in a way that torchvision does not have for tensors.
    """

    def __init__(self, processor: BaseImageProcessor):
        self.processor = processor
        is_own = isinstance(processor, IsoImageProcessor) and processor.resample in _MODES
        if not is_own and not isinstance(processor, TorchvisionBackend):
            raise RecipeError(
                f"data.decoder torchvision: {type(processor).__name__} with resample {processor.resample} has no "
                "transform on tensors; set data.decoder: pil"
            )

    def __call__(self, image: Image.Image | Tensor) -> Tensor:
        """Return 8 bits of shape (3, H, W) of an RGB image, or of its pixels (3, H, W)."""
        pixels, processor = to_pixels(image), self.processor
        if isinstance(processor, TorchvisionBackend):
            return processor([pixels], return_tensors="pt", do_rescale=False, do_normalize=False)["pixel_values"][0]
        if processor.do_resize:
            size = processor.size
            sides = [size.shortest_edge] if size.shortest_edge else [size.height, size.width]
            pixels = functional.resize(pixels, sides, interpolation=_MODES[processor.resample], antialias=True)
        if processor.do_center_crop:
            pixels = functional.center_crop(pixels, [processor.crop_size.height, processor.crop_size.width])
        return pixels


class RandomCrop:
    """timm's random crop on 8 bits: the same random numbers, and no detour through floats as it makes for tensors."""

    def __init__(self, crop: RandomResizedCropAndInterpolation):
        self.crop = crop

    def __call__(self, pixels: Tensor) -> Tensor:
        """Crop pixels (3, H, W), and scale them to the size of the crop."""
        crop = self.crop
        top, left, height, width = crop.get_params(pixels, crop.scale, crop.ratio)
        mode = random.choice(crop.interpolation) if isinstance(crop.interpolation, tuple) else crop.interpolation
        # A copy whose pixels lie one after the other, as those of a whole image do: scaling it takes half the time.
        rows = pixels.movedim(0, -1)[top : top + height, left : left + width].contiguous()
        return functional.resize(rows.movedim(-1, 0), list(crop.size), interpolation=mode, antialias=True)


def evaluation_transform(processor: BaseImageProcessor, decoding: Decoding) -> EvaluationTransform | PixelTransform:
    """Choose the transform for what the decoder gives; behind it comes `normalised`."""
    return (PixelTransform if decoding.decoder == "torchvision" else EvaluationTransform)(processor)


def normalisation(processor: BaseImageProcessor) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Return mean and standard deviation for pixels from 0 to 1, which is what timm normalises."""
    factor = 255 * processor.rescale_factor if processor.do_rescale else 255.0
    mean, std = (processor.image_mean, processor.image_std) if processor.do_normalize else ((0.0,) * 3, (1.0,) * 3)
    return tuple(value / factor for value in mean), tuple(value / factor for value in std)


def normalised(pixels: Tensor, processor: BaseImageProcessor) -> Tensor:
    """Make pixel values of images (..., 3, H, W) of 8 bits, on their device; what is no such thing stays as it is."""
    if pixels.dtype != torch.uint8:
        return pixels
    mean, std = normalisation(processor)
    return functional.normalize(pixels.to(torch.float32, memory_format=torch.contiguous_format).div_(255), mean, std)
