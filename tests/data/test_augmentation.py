import pickle
import random

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader
from torchvision.transforms import AugMix, AutoAugment, InterpolationMode, RandAugment, TrivialAugmentWide, functional
from transformers import ViTImageProcessor

from isoprune_hf.checkpoint.modeling_isoprune import IsoImageProcessor
from isoprune_hf.data.augmentation import (
    TransformedImages,
    seed_from,
    seeded_generators,
    train_transform,
)
from isoprune_hf.data.pixels import EvaluationTransform
from isoprune_hf.errors import RecipeError
from isoprune_hf.recipes import FinetuneRecipe

MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)


def make_processor(**changes: object) -> IsoImageProcessor:
    sizes = {"size": {"shortest_edge": 20}, "crop_size": {"height": 16, "width": 16}}
    return IsoImageProcessor(**{**sizes, "image_mean": list(MEAN), "image_std": list(STD), **changes})


def make_image(seed: int = 0, size: tuple[int, int] = (24, 32)) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8))


def no_augmentation(**changes: object) -> FinetuneRecipe:
    return FinetuneRecipe(**{"crop_scale": (1.0, 1.0), "hflip": 0.0, **changes})


def test_no_augmentation_is_the_evaluation_transform():
    image, processor = make_image(), make_processor()
    expected = processor(image, return_tensors="pt")["pixel_values"][0]
    assert torch.equal(train_transform(processor, no_augmentation())(image), expected)


def test_certain_flip_mirrors_the_evaluation_transform():
    image, processor = make_image(size=(16, 16)), make_processor(size={"height": 16, "width": 16})
    expected = EvaluationTransform(processor)(image).flip(-1)
    assert torch.equal(train_transform(processor, no_augmentation(hflip=1.0))(image), expected)


def test_crop_uses_the_settings_of_the_processor():
    # A random crop of (nearly) the whole of a square image is a plain resize, done here by torchvision.
    image, processor = make_image(size=(32, 32)), make_processor(resample=Image.Resampling.BILINEAR)
    recipe = FinetuneRecipe(crop_scale=(0.999999, 1.0), hflip=0.0)
    resized = functional.resize(image, [16, 16], functional.InterpolationMode.BILINEAR)
    expected = functional.normalize(functional.to_tensor(resized), MEAN, STD)
    torch.testing.assert_close(train_transform(processor, recipe)(image), expected)


@pytest.mark.parametrize("changes", [{"do_normalize": False}, {"rescale_factor": 1 / 127.5}, {"do_rescale": False}])
def test_pixels_are_scaled_as_the_processor_scales_them(changes):
    image = Image.new("RGB", (16, 16), (10, 100, 250))
    processor = make_processor(**changes)
    recipe = FinetuneRecipe(crop_scale=(0.5, 0.9), hflip=0.0)
    expected = EvaluationTransform(processor)(image)
    torch.testing.assert_close(train_transform(processor, recipe)(image), expected, atol=1e-4, rtol=1e-5)


def test_processor_without_crop_keeps_its_size():
    processor = ViTImageProcessor(size={"height": 12, "width": 20})
    assert train_transform(processor, FinetuneRecipe())(make_image()).shape == (3, 12, 20)


def test_policy_and_erasing_keep_the_shape():
    processor = make_processor()
    recipe = no_augmentation(auto_augment="rand-m9-mstd0.5-inc1", random_erasing=1.0)
    transformed = train_transform(processor, recipe)(make_image())
    assert transformed.shape == (3, 16, 16) and (transformed == 0).any()


def test_unknown_timm_policy_raises():
    with pytest.raises(RecipeError, match=r"finetune\.auto_augment: timm .*'nonsense'"):
        train_transform(make_processor(), FinetuneRecipe(auto_augment="nonsense"))


def test_seeds_of_neighbours_differ():
    assert len({seed_from(seed, epoch, index) for seed in range(3) for epoch in range(3) for index in range(9)}) == 81


def test_generators_have_their_old_state_after_the_block():
    def draw() -> tuple[float, float, float]:
        return random.random(), float(np.random.rand()), float(torch.rand(()))

    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    expected = draw()
    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    with seeded_generators(5, 6):
        inside = draw()
    assert draw() == expected
    with seeded_generators(5, 6):
        assert draw() == inside
    assert inside != expected


def test_augmentation_depends_on_seed_epoch_and_position_alone():
    split = [{"image": make_image(index), "label": index} for index in range(6)]
    recipe = FinetuneRecipe(auto_augment="rand-m9-mstd0.5-inc1", random_erasing=0.5)
    transform = train_transform(make_processor(), recipe)

    def load(order: list[int], epoch: int, workers: int) -> dict[int, torch.Tensor]:
        images = pickle.loads(pickle.dumps(TransformedImages(split, transform, (0, epoch))))
        loader = DataLoader(images, sampler=order, batch_size=2, num_workers=workers)
        return {int(p): image for positions, batch, *_ in loader for p, image in zip(positions, batch, strict=True)}

    first = load([0, 1, 2, 3, 4, 5], epoch=1, workers=0)
    second = load([4, 2, 5, 0, 3, 1], epoch=1, workers=2)
    other = load([0, 1, 2, 3, 4, 5], epoch=2, workers=0)
    assert all(torch.equal(first[position], second[position]) for position in range(6))
    assert not any(torch.equal(first[position], other[position]) for position in range(6))


@pytest.mark.parametrize(
    ("name", "policy"),
    [
        ("tv-rand-n2-m9", RandAugment(2, 9, interpolation=InterpolationMode.BICUBIC)),
        ("tv-auto", AutoAugment(interpolation=InterpolationMode.BICUBIC)),
        ("tv-trivial", TrivialAugmentWide(interpolation=InterpolationMode.BICUBIC)),
        ("tv-augmix", AugMix(interpolation=InterpolationMode.BICUBIC)),
    ],
)
def test_the_policies_of_torchvision_are_its_own(name, policy):
    image, processor = make_image(), make_processor(resample=3)
    with seeded_generators(7):
        mine = train_transform(processor, no_augmentation(auto_augment=name))(image)
    with seeded_generators(7):
        expected = EvaluationTransform(processor)(policy(image))
    assert torch.equal(mine, expected)


@pytest.mark.parametrize("name", ["tv-rand-n2-m31", "tv-rand-n0-m9", "tv-best", "tv-"])
def test_unknown_torchvision_policy_raises(name):
    with pytest.raises(RecipeError, match=rf"finetune\.auto_augment: torchvision .*{name!r}"):
        train_transform(make_processor(), no_augmentation(auto_augment=name))


def test_erased_boxes_are_zero_or_noise():
    image, processor = make_image(), make_processor()
    plain = EvaluationTransform(processor)(image)
    kinds = {}
    for fill in ("zero", "pixel"):
        with seeded_generators(1):
            erased = train_transform(processor, no_augmentation(random_erasing=1.0, random_erasing_fill=fill))(image)
        kinds[fill] = erased[erased != plain].unique()
    assert kinds["zero"].tolist() == [0.0] and len(kinds["pixel"]) > 20


def test_random_crops_are_scaled_as_the_recipe_says():
    image, processor = make_image(size=(64, 64)), make_processor(resample=2)
    crops = {}
    for interpolation in (None, "bilinear", "bicubic"):
        with seeded_generators(3):
            crops[interpolation] = train_transform(processor, FinetuneRecipe(interpolation=interpolation))(image)
    assert torch.equal(crops[None], crops["bilinear"]) and not torch.equal(crops["bilinear"], crops["bicubic"])
