"""Layers of eight bits are chosen on images that no range was fitted to."""

import numpy as np
import pytest

from isoprune_hf.export.bounded_int8 import hold_out


@pytest.mark.parametrize(
    ("sizes", "ranges", "held_out"),
    [
        ([3], [3], [3]),
        ([4], [3], [1]),
        ([6, 6], [6, 3], [3]),
        ([200, 160], [200, 96], [64]),
        ([2, 2, 2, 2], [2] * 3, [2]),
    ],
)
def test_last_quarter_of_images_is_held_out(sizes: list[int], ranges: list[int], held_out: list[int]) -> None:
    images = np.arange(sum(sizes)).reshape(-1, 1)
    parts = hold_out(np.split(images, np.cumsum(sizes)[:-1]))
    assert [[len(batch) for batch in part] for part in parts] == [ranges, held_out]
    assert np.concatenate(parts[0]).ravel().tolist() == list(range(sum(ranges)))
    assert np.concatenate(parts[1])[-1] == len(images) - 1
