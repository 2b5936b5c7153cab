"""The pictures of a comparison are alike in every call, differ from each other, and fit the channels of a model."""

import numpy as np
import pytest
from transformers import DetrImageProcessor

from isoprune_hf.checkpoint.image_processor import IsoImageProcessor
from isoprune_hf.export.pictures import draw_pictures


def processor(channels: int) -> IsoImageProcessor:
    """Return a processor of images of 32 pixels with a number of channels, whose values are those of the picture."""
    side = {"height": 32, "width": 32}
    return IsoImageProcessor(
        size={"shortest_edge": 32}, crop_size=side, image_mean=[0.0] * channels, image_std=[1.0] * channels
    )


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_pictures_have_channels_of_model_and_differ(channels: int) -> None:
    first, second = draw_pictures(processor(channels)), draw_pictures(processor(channels))
    assert [batch.shape for batch in first] == [(1, channels, 32, 32), (4, channels, 32, 32)]
    assert all(np.array_equal(one, other) for one, other in zip(first, second, strict=True))
    pictures = np.concatenate(first).reshape(5, -1)
    assert np.corrcoef(pictures)[~np.eye(5, dtype=bool)].max() < 0.9
    assert (pictures.std(axis=1) > 0.1).all()


def test_pictures_of_detector_have_one_size() -> None:
    batches = draw_pictures(DetrImageProcessor(size={"shortest_edge": 32, "longest_edge": 48}))
    assert [batch.shape for batch in batches] == [(1, 3, 32, 32), (4, 3, 32, 32)]


def test_neighbouring_pixels_resemble_each_other() -> None:
    (picture,) = draw_pictures(processor(3))[0]
    left, right = picture[..., :-1].ravel(), picture[..., 1:].ravel()
    assert 0.8 < np.corrcoef(left, right)[0, 1] < 0.999
