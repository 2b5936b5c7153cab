"""The decoder `torchvision`: the files that it reads, and how far its pixels are from those of the processor."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from helpers.evaluation import make_net
from helpers.images import BROKEN, encode, noise, open_images, with_orientation, write_images
from PIL import Image
from torchvision.io import ImageReadMode, decode_jpeg
from torchvision.transforms.v2 import functional
from transformers import ConvNextImageProcessor, ViTImageProcessor

from isoprune_hf.checkpoint.modeling_isoprune import IsoImageProcessor
from isoprune_hf.data.augmentation import TransformedImages, seeded_generators, train_transform
from isoprune_hf.data.decoding import Decoding, decode_image, decode_pixels
from isoprune_hf.data.loading import CalibrationBatches, LoaderOptions
from isoprune_hf.data.pixels import (
    EvaluationTransform,
    PixelTransform,
    evaluation_transform,
    normalisation,
    normalised,
)
from isoprune_hf.errors import DatasetError, RecipeError
from isoprune_hf.evaluation.evaluate import evaluate_model
from isoprune_hf.recipes import FinetuneRecipe
from isoprune_hf.training.finetune import finetune

FAST = Decoding(decoder="torchvision")
MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)


def make_processor(**changes: Any) -> IsoImageProcessor:
    sizes = {"size": {"shortest_edge": 40}, "crop_size": {"height": 32, "width": 32}}
    return IsoImageProcessor(**{**sizes, "image_mean": list(MEAN), "image_std": list(STD), **changes})


def smooth(size: tuple[int, int] = (100, 75)) -> Image.Image:
    """Return a picture with edges as soft as in photographs."""
    return noise((size[0] // 5, size[1] // 5)).resize(size, Image.Resampling.BICUBIC)


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
@pytest.mark.parametrize("options", [{}, {"quality": 95, "subsampling": 0}, {"progressive": True}])
def test_every_jpeg_kind_equals_pillow(mode: str, options: dict[str, Any]) -> None:
    content = encode(noise((51, 38), mode), "JPEG", **options)
    expected = np.asarray(decode_image(content)).transpose(2, 0, 1)
    assert np.array_equal(decode_pixels(content).numpy(), expected)


@pytest.mark.parametrize("kind", ["PNG", "GIF", "WEBP", "TIFF", "BMP"])
@pytest.mark.parametrize("mode", ["RGB", "L", "P"])
def test_other_files_are_read_by_pillow(kind: str, mode: str) -> None:
    if (kind, mode) == ("WEBP", "P"):
        pytest.skip("WebP has no palette")
    content = encode(noise().convert(mode), kind)
    assert np.array_equal(decode_pixels(content).numpy(), np.asarray(decode_image(content)).transpose(2, 0, 1))


@pytest.mark.parametrize("value", range(1, 9))
def test_jpegs_are_turned_upright_by_their_tag(value: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = value
    content = encode(noise(), "JPEG", exif=exif)
    assert np.array_equal(decode_pixels(content).numpy(), np.asarray(decode_image(content)).transpose(2, 0, 1))
    stored = decode_jpeg(torch.frombuffer(bytearray(content), dtype=torch.uint8), mode=ImageReadMode.RGB)
    assert torch.equal(decode_pixels(content, exif=False), stored)
    assert decode_pixels(with_orientation(noise(), value)).shape == ((3, 30, 40) if value < 5 else (3, 40, 30))


@pytest.mark.parametrize("kind", BROKEN)
def test_broken_images_have_the_errors_of_pillow(kind: str, tmp_path: Path) -> None:
    content, reason = BROKEN[kind]
    split = [{"image": {"path": None, "bytes": content}, "label": 0}]
    texts = []
    for decoding in (Decoding(), FAST):
        with pytest.raises(DatasetError, match=reason) as caught:
            TransformedImages(split, lambda image: image, decoding=decoding)[0]
        texts.append(str(caught.value))
    assert texts[0] == texts[1]
    grey = Decoding("grey", decoder="torchvision")
    assert TransformedImages(split, lambda image: image, decoding=grey)[0][1].unique().tolist() == [128]


def test_damaged_jpegs_are_handled_as_by_pillow() -> None:
    rng = np.random.default_rng(0)
    original, refused = encode(smooth(), "JPEG"), 0
    for _ in range(300):
        damaged = bytearray(original)
        for place in rng.integers(0, len(damaged), 3):
            damaged[place] = rng.integers(0, 256)
        damaged = bytes(damaged[: rng.integers(len(damaged) - 100, len(damaged) + 1)])
        split = [{"image": {"path": None, "bytes": damaged}, "label": 0}]
        samples = [
            TransformedImages(split, lambda image: image, decoding=Decoding("grey", decoder=decoder))[0]
            for decoder in ("pil", "torchvision")
        ]
        assert samples[0].is_replacement == samples[1].is_replacement
        refused += samples[0].is_replacement
        assert np.array_equal(samples[1].pixels.numpy(), np.asarray(samples[0].pixels).transpose(2, 0, 1))
    assert 0 < refused < 300


def difference(image: Image.Image, processor: IsoImageProcessor) -> torch.Tensor:
    """Return the absolute differences from the pixels that the processor normalises, of 255."""
    fast, exact = PixelTransform(processor)(functional.pil_to_tensor(image)), EvaluationTransform(processor)(image)
    assert fast.dtype == torch.uint8 and fast.shape == exact.shape == (3, 32, 32)
    return (fast - 255 * (exact * torch.tensor(STD)[:, None, None] + torch.tensor(MEAN)[:, None, None])).abs()


@pytest.mark.parametrize("resample", [1, 2, 3])
@pytest.mark.parametrize("size", [(100, 75), (75, 100), (90, 90)])
def test_pixel_transform_differs_only_by_rounding(resample: int, size: tuple[int, int]) -> None:
    differing = difference(smooth(size), make_processor(resample=resample))
    assert differing.max() < 2.01 and differing.mean() < 0.1 and (differing > 1.01).float().mean() < 0.005


@pytest.mark.parametrize("resample", [1, 2, 3])
@pytest.mark.parametrize("size", [(100, 75), (75, 100), (41, 301), (32, 33)])
@pytest.mark.parametrize(
    "changes",
    [{}, {"size": {"height": 32, "width": 47}}, {"do_center_crop": False}, {"image_mean": [0.4], "image_std": [0.2]}],
)
def test_default_decoder_gives_pixels_of_the_processor(
    resample: int, size: tuple[int, int], changes: dict[str, Any]
) -> None:
    processor = make_processor(resample=resample, **changes)
    image = noise(size).convert("L" if "image_mean" in changes else "RGB")
    pixels = evaluation_transform(processor, Decoding())(image)
    assert pixels.dtype == torch.uint8
    assert torch.equal(normalised(pixels, processor), EvaluationTransform(processor)(image))


@pytest.mark.parametrize(
    "changes",
    [
        {"rescale_factor": 1 / 100},
        {"do_rescale": False},
        {"resample": 0},
        {"do_resize": False},
        {"crop_size": {"height": 32, "width": 41}},
        {"image_mean": [0.1, 0.2, 0.3, 0.4], "image_std": [0.2] * 4},
    ],
)
def test_other_processors_make_their_pixels_themselves(changes: dict[str, Any]) -> None:
    assert isinstance(evaluation_transform(make_processor(**changes), Decoding()), EvaluationTransform)


def test_noise_differs_by_two_at_most() -> None:
    differing = difference(noise((400, 300)), make_processor())
    assert 0.5 < differing.max() < 2.01 and differing.mean() < 0.05


@pytest.mark.parametrize(
    "changes", [{}, {"do_normalize": False}, {"rescale_factor": 1 / 127.5}, {"do_rescale": False}]
)
def test_batch_normalisation_equals_the_processor(changes: dict[str, Any]) -> None:
    processor = make_processor(do_resize=False, do_center_crop=False, **changes)
    images = [noise((8, 8)), smooth((10, 10)).crop((0, 0, 8, 8))]
    expected = torch.stack([EvaluationTransform(processor)(image) for image in images])
    batch = torch.stack([functional.pil_to_tensor(image) for image in images])
    torch.testing.assert_close(normalised(batch, processor), expected, rtol=1e-5, atol=1e-5)
    assert normalised(expected, processor) is expected


@pytest.mark.parametrize("kind", [ViTImageProcessor, ConvNextImageProcessor])
def test_processors_of_transformers_give_their_own_pixels(kind: type) -> None:
    processor = kind(size={"shortest_edge": 32} if kind is ConvNextImageProcessor else {"height": 32, "width": 24})
    fast = PixelTransform(processor)(functional.pil_to_tensor(smooth()))
    expected = EvaluationTransform(processor)(smooth())
    assert fast.dtype == torch.uint8
    torch.testing.assert_close(normalised(fast, processor), expected, rtol=1e-5, atol=1e-5)


def test_unsupported_interpolation_raises() -> None:
    with pytest.raises(RecipeError, match=r"data\.decoder torchvision: .*resample 0"):
        PixelTransform(make_processor(resample=0))


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"interpolation": "random"},
        {"auto_augment": "rand-m9-mstd0.5-inc1"},
        {"crop_scale": (1.0, 1.0)},
        {"crop_scale": (1.0, 1.0), "auto_augment": "tv-rand-n2-m9"},
        {"random_erasing": 1.0},
        {"random_erasing": 1.0, "random_erasing_fill": "pixel", "crop_scale": (1.0, 1.0)},
    ],
)
def test_training_has_the_same_crops_flips_and_policies(changes: dict[str, Any]) -> None:
    processor, recipe = make_processor(), FinetuneRecipe(**changes)
    transforms = [train_transform(processor, recipe, decoding=decoding) for decoding in (None, FAST)]
    for seed in range(8):
        with seeded_generators(seed):
            exact = transforms[0](smooth())
        with seeded_generators(seed):
            fast = transforms[1](functional.pil_to_tensor(smooth()))
        assert (fast.dtype == torch.uint8) == ("random_erasing" not in changes)
        levels = (normalised(fast, processor) - exact).abs() * torch.tensor(STD)[:, None, None] * 255
        # A policy such as posterize can make much of a step of one; few pixels have such a step.
        if "auto_augment" in changes:
            assert levels.mean() < 1
        else:
            assert levels.max() < 2.01


def test_both_decoders_score_evaluate_and_train_alike(tmp_path: Path) -> None:
    root = write_images(tmp_path / "images", {})
    results = []
    for decoder in ("pil", "torchvision"):
        data = open_images(root, decoder=decoder)
        processor = IsoImageProcessor(size={"height": 4, "width": 4}, do_center_crop=False)
        options = LoaderOptions(batch_size=3, decoding=data.decoding)
        batches = CalibrationBatches(data.train, processor, options, batches=2, seed=0)
        net = make_net(classes=3)
        figures = evaluate_model(net, data.evaluation, processor, decoding=data.decoding)
        recipe = FinetuneRecipe(epochs=2, batch_size=6, distillation="none", crop_scale=(1.0, 1.0))
        history = finetune(net, data, processor, recipe, accelerator=Accelerator(cpu=True))["history"]
        values = torch.cat([pixel_values for pixel_values, _ in batches])
        results.append((values, figures["loss"], history[-1]["train_loss"], history[-1]["loss"]))
    # The images are stored in the size of the model: nothing is scaled, so only the normalisation rounds differently.
    torch.testing.assert_close(results[0][0], results[1][0], rtol=1e-5, atol=1e-5)
    assert results[0][1:] == pytest.approx(results[1][1:], rel=1e-5)
    assert results[0][0].dtype == torch.float32


def test_normalisation_is_for_pixels_up_to_one() -> None:
    assert normalisation(make_processor()) == (MEAN, STD)
