"""The normal equations of a least-squares fit (`NormalEquations`); the number of rows does not change their size."""

import math
from dataclasses import dataclass
from typing import Self

import torch
from accelerate import Accelerator

from isoprune_hf.pruning.calibration.gradients import sum_over_ranks
from isoprune_hf.pruning.repairing.centred_equations import CentredEquations
from isoprune_hf.pruning.repairing.equations import FLOAT64_BYTES, compared_type, damping, solve_positive
from isoprune_hf.pruning.repairing.fitted_rows import FitSize, Rows

# Matrices of the products of features: those of each half, and either, in the type of the layer, centred ones of each
# half, damped ones and their Cholesky factor, or damped ones and their factor in float64.
_HALVES, _COMPARED, _SOLVED = 2, 4, 2
_SOLUTIONS = 5  # of the products with outputs: those of each half, the right side, the solution and its copies


@dataclass(eq=False)
class NormalEquations:
    """Sums over rows, in float64: see `Equations`.

    Args:
        inputs: Sum of x x^T (G, F + 1, F + 1).
        missing: Sum of x y^T (G, F + 1, O).
        totals: Totals of the rows.
        dtype: Type of the layer.
    """

    inputs: torch.Tensor
    missing: torch.Tensor
    totals: torch.Tensor
    dtype: torch.dtype

    @classmethod
    def empty(cls, size: FitSize, device: torch.device) -> Self:
        """Return the sums of no rows."""
        features = size.features + 1
        shapes = ((size.groups, features, features), (size.groups, features, size.outputs), (3,))
        inputs, missing, totals = (torch.zeros(shape, dtype=torch.float64, device=device) for shape in shapes)
        return cls(inputs, missing, totals, size.dtype)

    @staticmethod
    def bytes_of(size: FitSize, rows: int) -> int:
        """Return an upper bound of the bytes of a fit to any number of rows."""
        features = size.features + 1
        compared = max(_COMPARED * compared_type(size.dtype).itemsize, _SOLVED * FLOAT64_BYTES)
        products = (_HALVES * FLOAT64_BYTES + compared) * features
        return size.groups * features * (products + _SOLUTIONS * FLOAT64_BYTES * size.outputs)

    def add(self, rows: Rows) -> None:
        """Add rows, in place."""
        self.inputs += torch.bmm(rows.features.mT, rows.features)
        self.missing += torch.bmm(rows.features.mT, rows.missing)
        self.totals += rows.totals()

    def add_ranks(self, accelerator: Accelerator | None) -> None:
        """Add the sums over the rows of all other ranks, in place."""
        sums = (self.inputs, self.missing, self.totals)
        self.inputs, self.missing, self.totals = sum_over_ranks(sums, accelerator)

    def absorb(self, other: Self) -> None:
        """Add the rows of other equations, in place."""
        self.inputs += other.inputs
        self.missing += other.missing
        self.totals += other.totals

    def with_some_outputs(self, most: int) -> CentredEquations:
        """Return a fit of at most so many outputs of each group, evenly spaced; its products have the layer's type."""
        count = self.totals[-1]
        missing = self.missing[..., :: -(-self.missing.shape[-1] // most)]
        mean, shift = self.inputs[:, :-1, -1:] / count, missing[:, -1:] / count
        products = torch.baddbmm(self.inputs[:, :-1, :-1], mean * -count, mean.mT)
        variance = products.diagonal(dim1=1, dim2=2).clone()
        rest = missing[:, :-1] - count * mean @ shift
        dtype = compared_type(self.dtype)
        return CentredEquations(products.to(dtype), rest.to(dtype), mean, shift, variance, count)

    def is_finite(self) -> bool:
        """Return whether all sums are finite."""
        return all(bool(sums.isfinite().all()) for sums in (self.inputs, self.missing, self.totals))

    def solve(self, ridge: float, *, has_shift: bool) -> torch.Tensor:
        """Solve (sum x x^T + D) W^T = sum x y^T for the change of a layer; see `Equations.solve`."""
        count = self.totals[-1]
        mean = self.inputs[:, :-1, -1:] / count
        shift = self.missing[:, -1:] / count
        if not has_shift:
            mean = torch.zeros_like(mean)
            shift = torch.zeros_like(shift)
        if math.isinf(ridge):
            return shift
        energy = self.inputs[:, :-1, :-1].diagonal(dim1=1, dim2=2)
        products = torch.baddbmm(self.inputs[:, :-1, :-1], mean * -count, mean.mT)
        diagonal = products.diagonal(dim1=1, dim2=2)
        diagonal += damping(ridge, diagonal, energy, count)
        weights = solve_positive(products, self.missing[:, :-1] - count * mean @ shift)
        return torch.cat([weights, shift - mean.mT @ weights], dim=1)

    def moments(self, weights: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Compute mean and variance of the outputs of weights; see `Equations.moments`."""
        count = self.totals[-1]
        mean = self.inputs[:, -1:, :-1] @ weights / count
        square = (self.inputs[:, :-1, :-1] @ weights).mul_(weights).sum(1, keepdim=True) / count
        return mean, square - mean.square()
