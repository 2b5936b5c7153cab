"""`Equations`: what both forms of a least-squares fit implement, and the damping and solution that they share.

A form collects the rows of one half of the images, and solves for the change of the layer. With x the features of each
group of outputs (the last one is the number 1) and y the part of the outputs that is missing, the change W minimizes
sum (y - W x)^2 + the damped squares of W, in float64.
"""

import math
from typing import Protocol, Self

import torch
from accelerate import Accelerator

from isoprune_hf.pruning.repairing.fitted_rows import FitSize, Rows

FLOAT64_BYTES = 8

# Added to the ridge, as a share of a feature's mean square, and for each row: the ridge of a feature that is always
# the same would be 0.
_CONSTANT_FLOOR = 1e-6
_RIDGE_FLOOR = 1e-8


class Fit(Protocol):
    """A fit to some rows whose ridge can be compared with others."""

    def solve(self, ridge: float, *, has_shift: bool) -> torch.Tensor:
        """Solve for the change of a layer: (G, F + 1, O), the last feature being the number 1, in float64.

        The ridge is a share of the variance of each feature; the change of the bias is not damped. With an infinite
        ridge, solve for the last feature only: (G, 1, O). Without a shift, the last row is 0. A change that cannot be
        computed is NaN.
        """

    def gain(self, change: torch.Tensor) -> float:
        """Compute how much of the squared error of the rows a change removes."""


class Equations(Protocol):
    """The equations of a fit to some rows.

    Attributes:
        totals: Totals of the rows (see `Rows.totals`).
    """

    totals: torch.Tensor

    @classmethod
    def empty(cls, size: FitSize, device: torch.device) -> Self:
        """Return the equations of no rows."""

    @staticmethod
    def bytes_of(size: FitSize, rows: int) -> int:
        """Return an upper bound of the bytes of a fit: of the equations of two halves of rows, and the solution."""

    def add(self, rows: Rows) -> None:
        """Add rows, in place."""

    def add_ranks(self, accelerator: Accelerator | None) -> None:
        """Add the rows of all other ranks, in place; each rank must call this."""

    def absorb(self, other: Self) -> None:
        """Add the rows of other equations, in place."""

    def with_some_outputs(self, most: int) -> Fit:
        """Return a fit of at most so many outputs of each group, evenly spaced."""

    def is_finite(self) -> bool:
        """Return whether all numbers are finite."""

    def solve(self, ridge: float, *, has_shift: bool) -> torch.Tensor:
        """Solve for the change of a layer; see `Fit.solve`."""

    def moments(self, weights: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Compute mean and variance (G, 1, O) over the rows of the outputs of weights (G, F, O) without a bias."""


def damping(ridge: float, variance: torch.Tensor, energy: torch.Tensor, count: torch.Tensor) -> torch.Tensor:
    """Return the damping of each feature.

    Args:
        ridge: Share of the variance.
        variance: Sums of squares of the features, without their means if a shift is fitted.
        energy: Sums of squares of the features.
        count: Number of rows.
    """
    return ridge * variance + _CONSTANT_FLOOR * energy + _RIDGE_FLOOR * count


def solve_positive(matrix: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """Solve symmetric equations (G, N, N) for right sides (G, N, O); NaN if the matrix is not positive definite."""
    factor, failed = torch.linalg.cholesky_ex(matrix)
    half = torch.linalg.solve_triangular(factor, right, upper=False)
    solution: torch.Tensor = torch.linalg.solve_triangular(factor.mT, half, upper=True)
    return solution.masked_fill_(failed.ne(0)[:, None, None], math.nan)


def compared_type(dtype: torch.dtype) -> torch.dtype:
    """Return the type in which ridges for a layer of a type are compared: float32 for halves."""
    return torch.promote_types(dtype, torch.float32)
