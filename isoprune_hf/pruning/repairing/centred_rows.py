"""The dual form of a fit around the means of its rows (`CentredRows`), for the comparison of ridges.

With centred rows X (N, F) and Y (N, O), the solution of the normal equations is, for a diagonal damping D > 0,

    (X^T X + D)^-1 X^T Y = D^-1 X^T (X D^-1 X^T + 1)^-1 Y.

For fewer rows than features the right side needs less memory and time.

Source:
    Saunders et al., Ridge Regression Learning Algorithm in Dual Variables, ICML 1998.
"""

import math
from dataclasses import dataclass

import torch

from isoprune_hf.pruning.repairing.equations import damping, solve_positive


@dataclass(frozen=True, eq=False)
class CentredRows:
    """Rows without their means, and the means: see `Fit`.

    The rows are in the type of the layer, which is as exact as it is for `CentredEquations`.

    Args:
        features: (G, N, F).
        missing: What the outputs lack (G, N, O).
        mean: Means of the features (G, 1, F), in float64, as all that follow.
        shift: Means of what the outputs lack (G, 1, O).
        variance: Sums of squares of the features without their means (G, 1, F).
        count: Number of rows.
    """

    features: torch.Tensor
    missing: torch.Tensor
    mean: torch.Tensor
    shift: torch.Tensor
    variance: torch.Tensor
    count: torch.Tensor

    def solve(self, ridge: float, *, has_shift: bool) -> torch.Tensor:
        """Solve for the change of a layer; see `Fit.solve`."""
        mean, shift = ((value if has_shift else torch.zeros_like(value)) for value in (self.mean, self.shift))
        if math.isinf(ridge):
            return shift
        energy = self.variance + self.count * self.mean.square()
        variance = self.variance if has_shift else energy
        root = damping(ridge, variance, energy, self.count).rsqrt().to(self.features.dtype)
        if has_shift:
            scaled, missing = self.features * root, self.missing
        else:
            scaled = (self.features + self.mean.to(root.dtype)).mul_(root)
            missing = self.missing + self.shift.to(root.dtype)
        weights = solve_scaled(scaled, missing, root).double()
        return torch.cat([weights, shift - mean @ weights], dim=1)

    def gain(self, change: torch.Tensor) -> float:
        """Compute how much of the squared error of the rows a change removes."""
        added, removed = change[:, -1:], 0.0
        if change.shape[1] > 1:
            outputs = self.features @ change[:, :-1].to(self.features.dtype)
            removed = float((outputs * (2 * self.missing - outputs)).sum(dtype=torch.float64))
            added = added + self.mean @ change[:, :-1]  # mean of what the change adds to each output
        return removed + float((self.count * added * (2 * self.shift - added)).sum())


def solve_scaled(scaled: torch.Tensor, missing: torch.Tensor, root: torch.Tensor) -> torch.Tensor:
    """Solve for weights (G, F, O) by the dual form.

    Args:
        scaled: Features, each divided by the square root of its damping: X D^-1/2 (G, N, F).
        missing: What the outputs lack (G, N, O).
        root: D^-1/2 (G, 1, F).
    """
    kernel = scaled @ scaled.mT
    kernel.diagonal(dim1=1, dim2=2).add_(1)
    weights = scaled.mT @ solve_positive(kernel, missing)
    return weights.mul_(root.mT)
