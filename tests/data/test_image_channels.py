"""Images are read with the channels of the model, in evaluation and in training, or are refused."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Array3D, ClassLabel, Dataset, DatasetDict, Features
from helpers.images import encode, noise
from PIL import Image

from isoprune_hf.checkpoint.image_processor import IsoImageProcessor
from isoprune_hf.data.augmentation import TransformedImages, seeded_generators, train_transform
from isoprune_hf.data.dataset import load_data
from isoprune_hf.data.decoding import Decoding, decode_image, decode_pixels, read_image, read_or_replace
from isoprune_hf.data.loading import CalibrationBatches, ImageLoader, LoaderOptions
from isoprune_hf.data.pixels import EvaluationTransform, evaluation_transform, normalised
from isoprune_hf.data.streaming import StreamedSplit
from isoprune_hf.errors import DatasetError, RecipeError
from isoprune_hf.recipes import DataRecipe, FinetuneRecipe

DECODERS = ["pil", "torchvision"]


def make_processor(channels: int) -> IsoImageProcessor:
    sizes = {"size": {"shortest_edge": 20}, "crop_size": {"height": 16, "width": 16}}
    return IsoImageProcessor(**sizes, image_mean=[0.4] * channels, image_std=[0.2] * channels)


def array(channels: int, height: int = 33, width: int = 27) -> np.ndarray:
    return np.random.default_rng(channels).integers(0, 256, (height, width, channels), dtype=np.uint8)


def row(content: Any) -> list[dict[str, Any]]:
    return [{"image": {"path": None, "bytes": content} if isinstance(content, bytes) else content, "label": 0}]


def read(content: Any, channels: int, decoder: str = "pil") -> np.ndarray:
    """Read an image as pixels (C, H, W)."""
    image = read_image(row(content), 0, Decoding(decoder=decoder, channels=channels)).image
    made = np.asarray(image)
    return made if isinstance(image, torch.Tensor) else made[None] if made.ndim == 2 else made.transpose(2, 0, 1)


@pytest.mark.parametrize("decoder", DECODERS)
@pytest.mark.parametrize(("mode", "kind"), [("L", "JPEG"), ("RGB", "JPEG"), ("CMYK", "JPEG"), ("L", "PNG")])
def test_files_become_grey_as_by_pillow(mode: str, kind: str, decoder: str) -> None:
    content = encode(noise(mode=mode), kind)
    assert np.array_equal(read(content, 1, decoder)[0], np.asarray(decode_image(content).convert("L")))
    if mode == "L":
        assert torch.equal(decode_pixels(content, channels=1)[0], decode_pixels(content)[0])


def test_wide_grey_is_clipped() -> None:
    content = encode(Image.fromarray(np.array([[77, 200 * 256 + 77]], np.uint16)))
    assert read(content, 1).tolist() == [[[77, 255]]]


@pytest.mark.parametrize("decoder", DECODERS)
def test_transparency_is_the_fourth_channel(decoder: str) -> None:
    image = array(4)
    assert np.array_equal(read(encode(Image.fromarray(image)), 4, decoder), image.transpose(2, 0, 1))
    palette = Image.new("P", (2, 1), 1)
    palette.putpalette([0, 0, 0, 255, 0, 0])
    content = encode(palette, transparency=bytes([255, 7]))
    assert read(content, 4, decoder)[:, 0, 0].tolist() == [255, 0, 0, 7]


@pytest.mark.parametrize("decoder", DECODERS)
@pytest.mark.parametrize("channels", [1, 3, 4, 6])
def test_arrays_are_read_in_either_layout(channels: int, decoder: str) -> None:
    image = array(channels)
    first = image.transpose(2, 0, 1)
    for given in (image, first, torch.from_numpy(first.copy()), first.tolist()):
        assert np.array_equal(read(given, channels, decoder), first)


@pytest.mark.parametrize("policy", ["error", "skip", "grey"])
@pytest.mark.parametrize(
    ("content", "channels"),
    [
        (encode(noise()), 4),
        (encode(noise()), 6),
        (noise(mode="L"), 2),
        (array(6), 3),
        (array(3), 1),
        (array(4).astype(np.float32), 4),
    ],
)
def test_other_channels_are_refused_under_every_policy(content: Any, channels: int, policy: Any) -> None:
    with pytest.raises(DatasetError) as caught:
        read_or_replace(row(content) * 3, 0, Decoding(broken=policy, channels=channels))
    assert "\n" not in str(caught.value) and "cannot be read" not in str(caught.value)


@pytest.mark.parametrize("workers", [0, 1])
def test_refusal_in_a_loader_process_is_one_line(workers: int) -> None:
    images = TransformedImages(row(encode(noise())), lambda image: image, decoding=Decoding(channels=6))
    with pytest.raises(DatasetError) as caught:
        list(ImageLoader(images, [[0]], num_workers=workers))
    assert str(caught.value).startswith("data: image 0 of its split: the model reads images of 6 channels")


@pytest.mark.parametrize("decoder", DECODERS)
@pytest.mark.parametrize("channels", [1, 3, 4, 6])
def test_broken_image_becomes_grey_in_all_channels(channels: int, decoder: str) -> None:
    decoding = Decoding(broken="grey", decoder=decoder, channels=channels)
    found = read_or_replace(row(b""), 0, decoding)
    pixels = evaluation_transform(make_processor(channels), decoding)(found.image)
    expected = torch.full((channels, 16, 16), (128 / 255 - 0.4) / 0.2)
    torch.testing.assert_close(normalised(pixels, make_processor(channels)), expected)


@pytest.mark.parametrize("kind", ["parquet", "saved"])
@pytest.mark.parametrize("layout", ["first", "last"])
def test_column_of_arrays_is_a_data_set(kind: str, layout: str, tmp_path: Path) -> None:
    images = [np.roll(array(6), number) for number in range(6)]
    stored = [image.transpose(2, 0, 1) if layout == "first" else image for image in images]
    features = Features({"pixels": Array3D(stored[0].shape, "uint8"), "label": ClassLabel(names=["a", "b"])})
    split = Dataset.from_dict({"pixels": stored, "label": [0, 1] * 3}, features=features)
    if kind == "parquet":
        split.to_parquet(tmp_path / "train-0.parquet")
    else:
        DatasetDict(train=split).save_to_disk(str(tmp_path))
    processor = make_processor(6)
    expected = torch.stack(
        [EvaluationTransform(processor)(torch.from_numpy(image.transpose(2, 0, 1).copy())) for image in images]
    )
    data = load_data(DataRecipe(dataset=str(tmp_path), image_column="pixels", holdout=0))
    (batch,) = CalibrationBatches(data.train, processor, LoaderOptions(6), batches=1, seed=0)
    assert sorted(map(float, batch[0].sum((1, 2, 3)))) == sorted(map(float, expected.sum((1, 2, 3))))
    stream = load_data(DataRecipe(dataset=str(tmp_path), image_column="pixels", streaming=True))
    rows = StreamedSplit(stream.train, 2, buffer=1).take(6, seed=0)
    assert {read(found["image"], 6).tobytes() for found in rows} == {
        image.transpose(2, 0, 1).tobytes() for image in images
    }


def test_column_of_other_arrays_is_refused(tmp_path: Path) -> None:
    features = Features({"image": Array3D((2, 3, 3), "float32"), "label": ClassLabel(names=["a"])})
    split = Dataset.from_dict({"image": [np.zeros((2, 3, 3), np.float32)], "label": [0]}, features=features)
    DatasetDict(train=split).save_to_disk(str(tmp_path))
    with pytest.raises(DatasetError, match=r"data\.image_column.*float32"):
        load_data(DataRecipe(dataset=str(tmp_path)))


@pytest.mark.parametrize("decoder", DECODERS)
@pytest.mark.parametrize("channels", [1, 4, 6])
@pytest.mark.parametrize(
    "changes", [{}, {"crop_scale": (1.0, 1.0)}, {"random_erasing": 1.0}, {"interpolation": "random"}]
)
def test_training_keeps_all_channels(changes: dict[str, Any], channels: int, decoder: str) -> None:
    processor, decoding = make_processor(channels), Decoding(decoder=decoder, channels=channels)
    transform = train_transform(processor, FinetuneRecipe(hflip=1.0, **changes), decoding=decoding)
    image = read_image(row(array(channels, 64, 64)), 0, decoding).image
    with seeded_generators(3):
        made = normalised(transform(image), processor)
    assert made.shape == (channels, 16, 16) and made.dtype == torch.float32
    if "crop_scale" in changes:  # only the flip is left, and it mirrors the evaluation pixels up to rounding
        expected = normalised(evaluation_transform(processor, decoding)(image), processor)
        torch.testing.assert_close(made.flip(-1), expected, rtol=0, atol=0.03)


@pytest.mark.parametrize("decoder", DECODERS)
@pytest.mark.parametrize(
    "policy",
    ["rand-m9-mstd0.5-inc1", "original", "3a", "augmix-m3-w3", "tv-auto", "tv-rand-n2-m9", "tv-trivial", "tv-augmix"],
)
def test_policies_change_grey_images(policy: str, decoder: str) -> None:
    processor, decoding = make_processor(1), Decoding(decoder=decoder, channels=1)
    transform = train_transform(
        processor, FinetuneRecipe(auto_augment=policy, interpolation="bilinear"), decoding=decoding
    )
    image = read_image(row(noise((64, 64), "L")), 0, decoding).image
    made = []
    for seed in range(20):
        with seeded_generators(seed):
            made.append(normalised(transform(image), processor))
    assert all(pixels.shape == (1, 16, 16) and pixels.isfinite().all() for pixels in made)


@pytest.mark.parametrize("channels", [4, 6])
def test_policies_need_grey_or_rgb_images(channels: int) -> None:
    with pytest.raises(RecipeError, match=r"finetune\.auto_augment"):
        train_transform(make_processor(channels), FinetuneRecipe(auto_augment="tv-trivial"))
