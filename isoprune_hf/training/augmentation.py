"""Image transforms for training and evaluation, both from the image processor that travels with the weights."""

import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from PIL import Image
from timm.data import create_transform
from torch.utils.data import Dataset
from torchvision.transforms import Compose, RandomHorizontalFlip
from transformers import BaseImageProcessor

from isoprune_hf.errors import RecipeError
from isoprune_hf.recipes import FinetuneRecipe
from isoprune_hf.training.data import read_image

Transform = Callable[[Image.Image], torch.Tensor]


class EvaluationTransform:
    """The processor's own transform for one RGB image; an object, because loader processes pickle it."""

    def __init__(self, processor: BaseImageProcessor):
        self.processor = processor

    def __call__(self, image: Image.Image) -> torch.Tensor:
        """Return pixel values of shape (C, H, W)."""
        return self.processor([image], return_tensors="pt")["pixel_values"][0]


def train_transform(processor: BaseImageProcessor, recipe: FinetuneRecipe) -> Transform:
    """Build the training transform: RGB image to pixel values of shape (C, H, W).

    Size, interpolation, mean and standard deviation are the processor's. With `crop_scale` (1, 1) nothing is cropped
    at random: the image passes through the evaluation transform, between the flip and policy before it and the erasing
    after it.

    Raises:
        RecipeError: timm does not know the policy of `auto_augment`.

    Note:
        It draws from the global generators of Python, NumPy and torch: call it within `seeded_generators`.
    """
    evaluation = EvaluationTransform(processor)
    height, width = evaluation(Image.new("RGB", (64, 64))).shape[-2:]
    mean, std = _normalisation(processor)
    resample = Image.Resampling.BILINEAR if processor.resample is None else Image.Resampling(processor.resample)
    try:
        crop, augment, normalise = create_transform(
            (height, width),
            is_training=True,
            separate=True,
            scale=recipe.crop_scale,
            hflip=recipe.hflip,
            color_jitter=None,
            auto_augment=recipe.auto_augment,
            interpolation=resample.name.lower(),
            mean=mean,
            std=std,
            re_prob=recipe.random_erasing,
        )
    except (AssertionError, KeyError, ValueError) as error:
        raise RecipeError(
            f"finetune.auto_augment: timm has no policy {recipe.auto_augment!r} ({error}); "
            "give one such as rand-m9-mstd0.5-inc1, original or augmix-m3-w3, or none"
        ) from error
    if tuple(recipe.crop_scale) != (1.0, 1.0):
        return Compose([crop, augment, normalise])
    flip = [RandomHorizontalFlip(recipe.hflip)] if recipe.hflip else []
    erasing = normalise.transforms[2:]  # after the conversion to a tensor and the normalisation
    return Compose([*flip, augment, evaluation, *erasing])


def _normalisation(processor: BaseImageProcessor) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Return mean and standard deviation for pixels from 0 to 1, which is what timm normalises."""
    factor = 255 * processor.rescale_factor if processor.do_rescale else 255.0
    mean, std = (processor.image_mean, processor.image_std) if processor.do_normalize else ((0.0,) * 3, (1.0,) * 3)
    return tuple(value / factor for value in mean), tuple(value / factor for value in std)


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
    """Gives (position, pixel values, label); with seeds, a transform draws from (*seeds, position) alone."""

    def __init__(self, split: Sequence[dict[str, Any]], transform: Transform, seeds: tuple[int, ...] | None = None):
        self.split, self.transform, self.seeds = split, transform, seeds

    def __len__(self) -> int:
        return len(self.split)

    def __getitem__(self, position: int) -> tuple[int, torch.Tensor, int]:
        image, label = read_image(self.split, position)
        if self.seeds is None:
            return position, self.transform(image), label
        with seeded_generators(*self.seeds, position):
            return position, self.transform(image), label
