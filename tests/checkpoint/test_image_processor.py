"""Images of any number of channels become pixel values of as many channels, and are never given others."""

import numpy as np
import pytest
import torch
from helpers.images import noise
from PIL import Image
from torchvision.transforms import CenterCrop, Compose, InterpolationMode, Normalize, Resize, ToTensor

from isoprune_hf.checkpoint.image_processor import IsoImageProcessor, channels_of, convert_image
from isoprune_hf.errors import ImageError

MEANS, STDS = [0.1, 0.2, 0.3, 0.4, 0.5, 0.6], [0.9, 0.8, 0.7, 0.6, 0.5, 0.4]


def make_processor(channels: int) -> IsoImageProcessor:
    sizes = {"size": {"shortest_edge": 20}, "crop_size": {"height": 16, "width": 16}}
    return IsoImageProcessor(**sizes, image_mean=MEANS[:channels], image_std=STDS[:channels])


def transform(image: Image.Image, channel: int) -> torch.Tensor:
    """Transform a grey image as timm and torchvision do."""
    normalise = Normalize(MEANS[channel : channel + 1], STDS[channel : channel + 1])
    return Compose([Resize(20, InterpolationMode.BICUBIC), CenterCrop(16), ToTensor(), normalise])(image)


def pixels(processor: IsoImageProcessor, image: object) -> torch.Tensor:
    return processor(image, return_tensors="pt").pixel_values[0]


def array(channels: int, height: int = 33, width: int = 27) -> np.ndarray:
    return np.random.default_rng(channels).integers(0, 256, (height, width, channels), dtype=np.uint8)


@pytest.mark.parametrize("channels", [1, 2, 3, 4, 6])
def test_number_of_channels_is_that_of_the_mean(channels: int) -> None:
    assert channels_of(make_processor(channels)) == channels
    assert pixels(make_processor(channels), array(channels)).shape == (channels, 16, 16)


def test_scalar_mean_belongs_to_rgb_images() -> None:
    processor = IsoImageProcessor(image_mean=0.5, image_std=0.5)
    assert channels_of(processor) == 3
    assert pixels(processor, noise()).shape[0] == 3


@pytest.mark.parametrize("mode", ["L", "RGB", "RGBA", "P", "1", "LA", "CMYK"])
def test_any_image_becomes_grey_as_by_pillow(mode: str) -> None:
    image = noise((27, 33)).convert(mode)
    assert torch.equal(pixels(make_processor(1), image), transform(image.convert("L"), 0))


def test_grey_image_survives_the_pipelines_conversion_to_rgb() -> None:
    every_level = Image.fromarray(np.arange(256, dtype=np.uint8).reshape(16, 16))
    assert np.array_equal(np.asarray(convert_image(every_level.convert("RGB"), 1)), np.asarray(every_level))


@pytest.mark.parametrize("channels", [2, 4, 6])
def test_channels_are_transformed_independently(channels: int) -> None:
    image = array(channels)
    found = pixels(make_processor(channels), image)
    for channel in range(channels):
        assert torch.equal(found[channel], transform(Image.fromarray(image[..., channel]), channel)[0])


def test_hidden_colours_of_rgba_are_kept() -> None:
    image = array(4)
    image[..., 3] = 0
    assert torch.equal(pixels(make_processor(4), Image.fromarray(image)), pixels(make_processor(4), image))
    assert pixels(make_processor(4), image)[0].std() > 0


@pytest.mark.parametrize("channels", [1, 4, 6])
def test_layouts_and_tensors_give_the_same_pixels(channels: int) -> None:
    processor, image = make_processor(channels), array(channels)
    first = image.transpose(2, 0, 1)
    expected = pixels(processor, image)
    assert torch.equal(pixels(processor, first), expected)
    assert torch.equal(pixels(processor, torch.from_numpy(first.copy())), expected)
    batch = processor([image, image], return_tensors="pt").pixel_values
    assert torch.equal(batch, torch.stack([expected, expected]))


def test_named_layout_resolves_an_ambiguous_shape() -> None:
    processor, image = make_processor(6), array(6, height=6, width=40)
    last = processor(image, return_tensors="pt", input_data_format="channels_last").pixel_values[0]
    assert torch.equal(last, pixels(processor, image.transpose(2, 0, 1)))


@pytest.mark.parametrize(("channels", "mode"), [(4, "RGB"), (4, "L"), (4, "CMYK"), (6, "RGB"), (2, "LA")])
def test_image_without_these_channels_is_refused(channels: int, mode: str) -> None:
    with pytest.raises(ImageError, match=f"images of {channels} channels.*{mode}"):
        pixels(make_processor(channels), noise(mode="RGB").convert(mode))


@pytest.mark.parametrize(("channels", "shape"), [(1, (9, 9, 3)), (4, (9, 9, 3)), (6, (9, 9)), (6, (4, 9, 9))])
def test_array_without_these_channels_is_refused(channels: int, shape: tuple[int, ...]) -> None:
    with pytest.raises(ImageError):
        make_processor(channels).process_image(np.zeros(shape, np.uint8))


def test_saved_processor_keeps_its_channels(tmp_path) -> None:
    make_processor(6).save_pretrained(tmp_path)
    assert torch.equal(
        pixels(IsoImageProcessor.from_pretrained(tmp_path), array(6)), pixels(make_processor(6), array(6))
    )
