"""Triangles of symmetric matrices, compared with the matrices."""

import numpy as np
import pytest
import torch

from isoprune_hf.pruning.scoring.triangle import (
    triangle_blocks,
    triangle_column,
    triangle_diagonal,
    triangle_of_products,
)


@pytest.mark.parametrize("channels", [1, 7, 512, 513, 1300])
def test_columns_and_diagonal_equal_those_of_matrix(channels: int) -> None:
    factors = torch.randint(-9, 10, (5, channels), generator=torch.Generator().manual_seed(0)).double()
    matrix = (factors.T @ factors).numpy()  # of integers: exact in any order
    blocks = triangle_blocks(triangle_of_products(factors).numpy(), channels)
    assert np.array_equal(triangle_diagonal(blocks), matrix.diagonal())
    for column in {0, channels // 2, channels - 1}:
        assert np.array_equal(triangle_column(blocks, column), matrix[:, column])


def test_triangle_of_wide_matrix_needs_half() -> None:
    assert len(triangle_of_products(torch.zeros(0, 4096))) / 4096**2 == pytest.approx(0.5625)  # (8 + 1) / 16
