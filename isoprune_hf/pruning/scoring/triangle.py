"""The upper triangle of a symmetric matrix, stored as one vector: half of the memory of the matrix.

The rows are cut into blocks; a block of rows holds the columns from its diagonal on, so the squares along the diagonal
are complete. The vector is the concatenation of the blocks.
"""

from collections.abc import Sequence

import numpy as np
import torch

_ROWS = 512  # of a block: the squares along the diagonal store rows x channels / 2 numbers twice


def triangle_of_products(factors: torch.Tensor) -> torch.Tensor:
    """Compute the triangle of F^T F as a vector, for factors F (n, channels)."""
    starts = range(0, factors.shape[1], _ROWS)
    return torch.cat([(factors[:, start : start + _ROWS].T @ factors[:, start:]).flatten() for start in starts])


def triangle_blocks(triangle: np.ndarray, channels: int) -> list[np.ndarray]:
    """Return the blocks of a triangle as views: block k has rows and columns from its diagonal on."""
    blocks = []
    at = 0
    for start in range(0, channels, _ROWS):
        shape = min(_ROWS, channels - start), channels - start
        blocks.append(triangle[at : at + shape[0] * shape[1]].reshape(shape))
        at += shape[0] * shape[1]
    return blocks


def triangle_diagonal(blocks: Sequence[np.ndarray]) -> np.ndarray:
    """Return the diagonal of the matrix: (channels,)."""
    return np.concatenate([block.diagonal() for block in blocks])


def triangle_column(blocks: Sequence[np.ndarray], column: int) -> np.ndarray:
    """Return a column of the matrix: (channels,); below the diagonal it is read from the row of the same number."""
    last, row = divmod(column, _ROWS)
    above = [block[:, column - number * _ROWS] for number, block in enumerate(blocks[:last])]
    return np.concatenate([*above, blocks[last][row]])
