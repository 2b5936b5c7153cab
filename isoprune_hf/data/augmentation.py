"""Image transforms for training, from the image processor that travels with the weights, and their random numbers."""

import random
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np
import torch
from PIL import Image
from timm.data import create_transform
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

from isoprune_hf.data.dataset import leave_encoded
from isoprune_hf.data.decoding import Decoding, describe_broken, read_or_replace
from isoprune_hf.data.pixels import EvaluationTransform, PixelTransform, RandomCrop, normalisation, normalised
from isoprune_hf.errors import RecipeError
from isoprune_hf.recipes import FinetuneRecipe

_BINS = 31  # steps of torchvision's strengths
Transform = Callable[[Image.Image | torch.Tensor], torch.Tensor]


def train_transform(
    processor: BaseImageProcessor, recipe: FinetuneRecipe, *, decoding: Decoding | None = None
) -> Transform:
    """Build the training transform: RGB image to pixel values of shape (C, H, W).

    For the decoder `torchvision` it takes pixels and gives 8 bits, which `normalised` makes pixel values of; with
    random erasing, which fills with normalised numbers, pixel values. The random numbers are the same.

    Size, interpolation, mean and standard deviation are the processor's. With `crop_scale` (1, 1) nothing is cropped
    at random: the image passes through the evaluation transform, between the flip and policy before it and the erasing
    after it.

    Raises:
        RecipeError: timm, or torchvision for `tv-`, does not know the policy of `auto_augment`.

    Note:
        It draws from the global generators of Python, NumPy and torch: call it within `seeded_generators`.
    """
    is_fast = decoding is not None and decoding.decoder == "torchvision"
    evaluation = EvaluationTransform(processor)
    height, width = evaluation(Image.new("RGB", (64, 64))).shape[-2:]
    mean, std = normalisation(processor)
    resample = Image.Resampling.BILINEAR if processor.resample is None else Image.Resampling(processor.resample)
    interpolation = recipe.interpolation or resample.name.lower()
    is_torchvision = (recipe.auto_augment or "").startswith("tv-")
    try:
        crop, augment, normalise = create_transform(
            (height, width),
            is_training=True,
            separate=True,
            scale=recipe.crop_scale,
            hflip=recipe.hflip,
            color_jitter=None,
            auto_augment=None if is_torchvision else recipe.auto_augment,
            interpolation=interpolation,
            mean=mean,
            std=std,
            re_prob=recipe.random_erasing,
            re_mode="pixel" if recipe.random_erasing_fill == "pixel" else "const",
        )
    except (AssertionError, KeyError, ValueError) as error:
        raise RecipeError(
            f"finetune.auto_augment: timm has no policy {recipe.auto_augment!r} ({error}); "
            "give one such as rand-m9-mstd0.5-inc1, original or augmix-m3-w3, or none"
        ) from error
    if is_torchvision:
        augment = _torchvision_policy(recipe.auto_augment, interpolation)
    is_cropped = tuple(recipe.crop_scale) != (1.0, 1.0)
    erasing = normalise.transforms[2:]  # after the conversion to a tensor and the normalisation
    flip = [RandomHorizontalFlip(recipe.hflip)] if recipe.hflip else []
    if is_fast:
        # Policies work on images of Pillow, since those of torchvision do not do quite the same with tensors.
        policy = [ToPILImage(), augment, PILToTensor()] if recipe.auto_augment else []
        ending = [partial(normalised, processor=processor), *erasing] if erasing else []
        cropping = [RandomCrop(crop.transforms[0]), *crop.transforms[1:]]
        begin, end = (cropping, []) if is_cropped else (flip, [PixelTransform(processor)])
        return Compose([*begin, *policy, *end, *ending])
    if is_cropped:
        return Compose([crop, augment, normalise])
    return Compose([*flip, augment, evaluation, *erasing])


def _torchvision_policy(name: str, interpolation: str) -> Transform:
    """Build a policy of torchvision: its strengths are others than those of timm's policies of the same names."""
    mode = InterpolationMode.BILINEAR if interpolation == "random" else InterpolationMode(interpolation)
    rand = re.fullmatch(r"tv-rand-n(\d+)-m(\d+)", name)
    if rand and int(rand[1]) > 0 and int(rand[2]) < _BINS:
        return RandAugment(int(rand[1]), int(rand[2]), num_magnitude_bins=_BINS, interpolation=mode)
    kinds = {"tv-auto": AutoAugment, "tv-trivial": TrivialAugmentWide, "tv-augmix": AugMix}
    if name in kinds:
        return kinds[name](interpolation=mode)
    raise RecipeError(
        f"finetune.auto_augment: torchvision has no policy {name!r}; give tv-rand-nN-mM with M below {_BINS}, as "
        f"tv-rand-n2-m9, or one of {', '.join(kinds)}"
    )


def seed_from(*numbers: int) -> int:
    """Mix numbers such as (seed, epoch, index) into one 64-bit seed; near numbers give unrelated seeds."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0])


@contextmanager
def seeded_generators(*numbers: int) -> Iterator[None]:
    """Seed the generators of Python, NumPy and torch (CPU) inside the block and put their states back after it.

    A sample seeded by (seed, epoch, index) is augmented the same in any worker, on any rank and after a restart.
    """
    seed = seed_from(*numbers)
    python_state, numpy_state, torch_state = random.getstate(), np.random.get_state(), torch.get_rng_state()
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.default_generator.manual_seed(seed)  # torch.manual_seed would reseed dropout on the accelerator too
    try:
        yield
    finally:
        random.setstate(python_state)
        np.random.set_state(numpy_state)
        torch.set_rng_state(torch_state)


class TransformedImages(Dataset):
    """Gives (position, pixel values, label) at a position, or at (position, number of the copy).

    With seeds, a transform draws from (*seeds, position) alone, and from the number of a copy behind the first. Where
    the image could not be read and another one is in its place, the position comes as its complement, `~position`.
    """

    def __init__(
        self,
        split: Sequence[dict[str, Any]],
        transform: Transform,
        seeds: tuple[int, ...] | None = None,
        *,
        decoding: Decoding | None = None,
        is_counted: bool = False,
    ):
        self.split, self.transform, self.seeds = leave_encoded(split), transform, seeds
        self.decoding, self._is_counted = decoding or Decoding(), is_counted

    def __len__(self) -> int:
        return len(self.split)

    def __getitem__(self, at: int | tuple[int, int]) -> tuple[int, torch.Tensor, int]:
        position, copy = at if isinstance(at, tuple) else (at, 0)
        image, label, is_itself = read_or_replace(self.split, position, self.decoding, is_counted=self._is_counted)
        noted = position if is_itself else ~position
        if self.seeds is None:
            return noted, self.transform(image), label
        with seeded_generators(*self.seeds, position, *[copy] * bool(copy)):
            return noted, self.transform(image), label

    def describe(self, position: int) -> str:
        """Say why the image at a position cannot be read."""
        return describe_broken(self.split, position, self.decoding)
