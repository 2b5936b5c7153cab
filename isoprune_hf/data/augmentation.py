"""Training transforms of a recipe, and the seeds that make each sample independent of workers and ranks.

`train_transform` builds the transform; `seeded_generators` seeds the generators that it draws from.
"""

import random
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from timm.data.transforms_factory import create_transform
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.transforms import (
    AugMix,
    AutoAugment,
    Compose,
    InterpolationMode,
    PILToTensor,
    RandAugment,
    RandomHorizontalFlip,
    ToPILImage,
    TrivialAugmentWide,
)
from transformers import BaseImageProcessor

from isoprune_hf.data.dataset import with_encoded_images
from isoprune_hf.data.decoding import (
    PILLOW_CHANNELS,
    Decoding,
    Rows,
    describe_broken,
    grey_image,
    read_or_replace,
)
from isoprune_hf.data.label_columns import encoder_of
from isoprune_hf.data.pixels import (
    EvaluationTransform,
    RandomCrop,
    Transform,
    evaluation_transform,
    normalisation,
    normalised,
    settings_of,
)
from isoprune_hf.errors import RecipeError
from isoprune_hf.recipes import FinetuneRecipe

_MAGNITUDE_BINS = 31  # levels of strength of torchvision's RandAugment
_TORCHVISION_POLICIES = {"tv-auto": AutoAugment, "tv-trivial": TrivialAugmentWide, "tv-augmix": AugMix}


def train_transform(
    processor: BaseImageProcessor, recipe: FinetuneRecipe, *, decoding: Decoding | None = None
) -> Transform:
    """Build the training transform: image to pixel values of shape (C, H, W).

    For the decoder `torchvision` it maps uint8 pixels to uint8 pixels, which `normalised` completes; with random
    erasing, which fills with normalised numbers, to pixel values. The random numbers are the same for both decoders.
    Images that are neither grey nor RGB are tensors for both decoders, and their random crops are those of tensors.

    Size, interpolation, mean and std are the processor's. With `crop_scale` (1, 1) there is no random crop: the image
    passes through the evaluation transform, after flip and policy and before random erasing.

    Raises:
        RecipeError: timm, or torchvision for `tv-`, does not know the policy of `auto_augment`, or the images are
            neither grey nor RGB.

    Note:
        It draws from the global generators of Python, NumPy and torch: call it within `seeded_generators`.
    """
    decoding = (decoding or Decoding()).for_processor(processor)
    if recipe.auto_augment is not None and decoding.channels not in PILLOW_CHANNELS:
        raise RecipeError(
            f"finetune.auto_augment: policies change grey and RGB images, the model reads {decoding.channels} "
            "channels; set null"
        )
    crop, augment, normalise = _timm_transforms(processor, recipe, decoding)
    if recipe.auto_augment is not None and recipe.auto_augment.startswith("tv-"):
        augment = _torchvision_policy(recipe.auto_augment, _interpolation(processor, recipe))
    is_cropped = tuple(recipe.crop_scale) != (1.0, 1.0)
    erasing = normalise.transforms[2:]  # after the conversion to a tensor and the normalisation
    flip = [RandomHorizontalFlip(recipe.hflip)] if recipe.hflip else []
    transform: Transform
    if decoding.makes_tensors:
        # Policies run on Pillow images: those of torchvision give slightly different results on tensors.
        policy = [ToPILImage(), augment, PILToTensor()] if recipe.auto_augment else []
        to_values = [partial(normalised, processor=processor), *erasing] if erasing else []
        if is_cropped:
            transform = Compose([RandomCrop(crop.transforms[0]), *crop.transforms[1:], *policy, *to_values])
        else:
            transform = Compose([*flip, *policy, evaluation_transform(processor, decoding), *to_values])
    elif is_cropped:
        transform = Compose([crop, augment, normalise])
    else:
        transform = Compose([*flip, augment, EvaluationTransform(processor), *erasing])
    return transform


def _timm_transforms(
    processor: BaseImageProcessor, recipe: FinetuneRecipe, decoding: Decoding
) -> tuple[Compose, Transform, Compose]:
    """Return timm's random crop, policy, and normalisation with random erasing."""
    height, width = EvaluationTransform(processor)(grey_image(replace(decoding, decoder="pil"), 64)).shape[-2:]
    mean, std = normalisation(processor)
    is_torchvision = (recipe.auto_augment or "").startswith("tv-")
    try:
        crop, augment, normalise = create_transform(
            (height, width),
            is_training=True,
            separate=True,
            scale=recipe.crop_scale,
            hflip=recipe.hflip,
            color_jitter=None,  # type: ignore[arg-type]  # timm accepts None, its annotation does not
            auto_augment=None if is_torchvision else recipe.auto_augment,
            interpolation=_interpolation(processor, recipe),
            mean=mean,
            std=std,
            re_prob=recipe.random_erasing,
            re_mode="pixel" if recipe.random_erasing_fill == "pixel" else "const",
        )
    except (AssertionError, KeyError, ValueError) as error:
        raise RecipeError(
            f"finetune.auto_augment: timm has no policy {recipe.auto_augment!r} ({error}); "
            "set a policy such as rand-m9-mstd0.5-inc1, original or augmix-m3-w3, or null"
        ) from error
    return crop, augment, normalise


def _interpolation(processor: BaseImageProcessor, recipe: FinetuneRecipe) -> str:
    resample = settings_of(processor).resample
    own = Image.Resampling.BILINEAR if resample is None else Image.Resampling(resample)
    return recipe.interpolation or own.name.lower()


def _torchvision_policy(name: str, interpolation: str) -> Transform:
    """Build a policy of torchvision; its strengths differ from timm's policies of the same names."""
    mode = InterpolationMode.BILINEAR if interpolation == "random" else InterpolationMode(interpolation)
    policy: Transform
    rand = re.fullmatch(r"tv-rand-n(\d+)-m(\d+)", name)
    if rand and int(rand[1]) > 0 and int(rand[2]) < _MAGNITUDE_BINS:
        policy = RandAugment(int(rand[1]), int(rand[2]), num_magnitude_bins=_MAGNITUDE_BINS, interpolation=mode)
    elif name in _TORCHVISION_POLICIES:
        policy = _TORCHVISION_POLICIES[name](interpolation=mode)
    else:
        raise RecipeError(
            f"finetune.auto_augment: torchvision has no policy {name!r}; set tv-rand-nN-mM with N above 0 and M below "
            f"{_MAGNITUDE_BINS}, such as tv-rand-n2-m9, or one of {', '.join(_TORCHVISION_POLICIES)}"
        )
    return policy


def seed_from(*numbers: int) -> int:
    """Mix numbers such as (seed, epoch, index) into one 64-bit seed; close numbers give unrelated seeds."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0])


@contextmanager
def seeded_generators(*numbers: int) -> Iterator[None]:
    """Seed the generators of Python, NumPy and torch (CPU) inside the block, and restore their states after it.

    A sample seeded by (seed, epoch, index) is augmented the same in any worker, on any rank and after a restart.
    """
    seed = seed_from(*numbers)
    python_state = random.getstate()
    numpy_state = np.random.get_state()
    torch_state = torch.get_rng_state()
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.default_generator.manual_seed(seed)  # torch.manual_seed would reseed dropout on the accelerator too
    try:
        yield
    finally:
        random.setstate(python_state)
        np.random.set_state(numpy_state)
        torch.set_rng_state(torch_state)


class Sample(NamedTuple):
    """A transformed image.

    Args:
        position: Position in the split.
        pixels: Output of the transform.
        label: Index of the class; of a list of classes zeros and ones, of shape (C,).
        is_replacement: The image at this position could not be read, so pixels and label belong to the replacement.
    """

    position: int
    pixels: Tensor
    label: int | Tensor
    is_replacement: bool


class ImageSource(Dataset[Sample]):
    """Transforms the rows of a split or of a stream into samples.

    Args:
        transform: Makes the pixels of an image.
        seeds: If given, the transform draws only from generators seeded by (*seeds, position), and by the number of
            the copy for all copies after the first.
        decoding: How images are read.
        keep_labels: Never replace a row by another one; see `read_or_replace`.
        encode: Makes the target of a list of classes, see `encoder_of`; None for one class of each image.
    """

    def __init__(
        self,
        transform: Transform,
        seeds: tuple[int, ...] | None = None,
        *,
        decoding: Decoding | None = None,
        keep_labels: bool = False,
        encode: Callable[[Any], Tensor] | None = None,
    ):
        self.transform = transform
        self.seeds = seeds
        self.decoding = decoding or Decoding()
        self._keep_labels = keep_labels
        self._encode = encode

    def load(self, rows: Rows, position: int, copy: int = 0) -> Sample:
        """Read and transform one row."""
        image, label, is_replacement = read_or_replace(rows, position, self.decoding, keep_label=self._keep_labels)
        label = label if self._encode is None else self._encode(label)
        if self.seeds is None:
            return Sample(position, self.transform(image), label, is_replacement)
        with seeded_generators(*self.seeds, position, *([copy] if copy else [])):
            return Sample(position, self.transform(image), label, is_replacement)

    def describe(self, position: int) -> str:
        """Return why the image at a position cannot be read."""
        raise NotImplementedError


class TransformedImages(ImageSource):
    """Samples of a split, by position or by (position, number of the copy); see `ImageSource` for the arguments."""

    def __init__(
        self,
        split: Rows,
        transform: Transform,
        seeds: tuple[int, ...] | None = None,
        *,
        decoding: Decoding | None = None,
        keep_labels: bool = False,
    ):
        super().__init__(transform, seeds, decoding=decoding, keep_labels=keep_labels, encode=encoder_of(split))
        self.split = with_encoded_images(split)

    def __len__(self) -> int:
        return len(self.split)

    def __getitem__(self, at: int | tuple[int, int]) -> Sample:
        position, copy = at if isinstance(at, tuple) else (at, 0)
        return self.load(self.split, position, copy)

    def describe(self, position: int) -> str:
        return describe_broken(self.split, position, self.decoding)
