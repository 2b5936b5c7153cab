"""The equations of a fit around the means of their rows (`CentredEquations`), for the comparison of ridges."""

import math
from dataclasses import dataclass

import torch

from isoprune_hf.pruning.repairing.equations import damping, solve_positive


@dataclass(frozen=True, eq=False)
class CentredEquations:
    """Sums over rows without their means, and the means: see `Fit`.

    The products are in the type of the layer. Of a float32 one that is enough to compare ridges: a Cholesky factor is
    as exact as a change of each variance by some 1e-7 of the largest eigenvalue of the correlations, which is at most
    their number, and the smallest ridge is 3e-3 of each variance.

    Args:
        products: Sum of (x - mean) (x - mean)^T (G, F, F).
        missing: Sum of (x - mean) (y - shift)^T (G, F, O).
        mean: Means of the features (G, F, 1), in float64, as all that follow.
        shift: Means of what the outputs lack (G, 1, O).
        variance: Sums of squares of the features without their means (G, F).
        count: Number of rows.
    """

    products: torch.Tensor
    missing: torch.Tensor
    mean: torch.Tensor
    shift: torch.Tensor
    variance: torch.Tensor
    count: torch.Tensor

    def solve(self, ridge: float, *, has_shift: bool) -> torch.Tensor:
        """Solve for the change of a layer; see `Fit.solve`."""
        shift = self.shift if has_shift else torch.zeros_like(self.shift)
        if math.isinf(ridge):
            return shift
        energy = self.variance + self.count * self.mean[..., 0].square()
        if has_shift:
            products, missing, variance = self.products.clone(), self.missing, self.variance
        else:
            far = (self.count * self.mean).to(self.products.dtype)
            products = torch.baddbmm(self.products, far, self.mean.mT.to(far.dtype))
            missing = torch.baddbmm(self.missing, far, self.shift.to(far.dtype))
            variance = energy
        products.diagonal(dim1=1, dim2=2).add_(damping(ridge, variance, energy, self.count))
        weights = solve_positive(products, missing).double()
        mean = self.mean if has_shift else torch.zeros_like(self.mean)
        return torch.cat([weights, shift - mean.mT @ weights], dim=1)

    def gain(self, change: torch.Tensor) -> float:
        """Compute how much of the squared error of the rows a change removes."""
        added, removed = change[:, -1:], 0.0
        if change.shape[1] > 1:
            weights = change[:, :-1].to(self.products.dtype)
            added = added + self.mean.mT @ change[:, :-1]  # mean of what the change adds to each output
            removed = float((weights * (2 * self.missing - self.products @ weights)).sum(dtype=torch.float64))
        return removed + float((self.count * added * (2 * self.shift - added)).sum())
