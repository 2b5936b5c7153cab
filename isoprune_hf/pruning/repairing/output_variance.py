"""Scale the outputs of a fitted layer to the variance of the dense ones (`match_variance`).

A least-squares fit reproduces the part of an output that follows from its inputs, so the fitted outputs vary less than
the dense ones, and over the layers of a network the loss multiplies. The distances of each output from its mean are
therefore enlarged; the mean, which the fit restores, stays.

Source:
    Jordan et al., REPAIR: REnormalizing Permuted Activations for Interpolation Repair, ICLR 2023, there for the
    average of two networks.
"""

from dataclasses import dataclass
from typing import Self

import torch
from accelerate import Accelerator

from isoprune_hf.pruning.calibration.gradients import sum_over_ranks
from isoprune_hf.pruning.repairing.equations import Equations
from isoprune_hf.pruning.repairing.fitted_rows import FitSize, Rows

_MAX_SCALE = 2.0  # and its inverse the smallest: an output of which the inputs say little is mostly noise
_CONSTANT = 1e-4  # share of the mean square: a smaller variance may be that of rounding in float32


@dataclass(eq=False)
class DenseMoments:
    """Sums of the outputs of the dense layer.

    Args:
        sums: Sums of the outputs and of their squares (2, G, 1, O), in float64.
    """

    sums: torch.Tensor

    @classmethod
    def empty(cls, size: FitSize, device: torch.device) -> Self:
        """Return the sums of no rows."""
        return cls(torch.zeros(2, size.groups, 1, size.outputs, dtype=torch.float64, device=device))

    def add(self, rows: Rows) -> None:
        """Add rows, in place."""
        outputs = (rows.output + rows.missing).double()
        self.sums += torch.stack([outputs.sum(1, keepdim=True), outputs.square().sum(1, keepdim=True)])

    def add_ranks(self, accelerator: Accelerator | None) -> None:
        """Add the sums over the rows of all other ranks, in place; each rank must call this."""
        self.sums = sum_over_ranks(self.sums, accelerator)

    def moments(self, count: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return mean and variance of each output (G, 1, O) over so many rows."""
        mean, square = self.sums / count
        return mean, square - mean.square()


def match_variance(change: torch.Tensor, weights: torch.Tensor, equations: Equations, dense: DenseMoments) -> None:
    """Alter the change of a layer, in place, so that each output gets the variance of the dense one.

    Args:
        change: The solution of the fit (G, F + 1, O), the last row for the bias, in float64.
        weights: Weights of the layer before it (G, F, O).
        equations: The equations that it solves.
        dense: Moments of the dense outputs over the same rows.
    """
    fitted = change[:, :-1] + weights
    found, wanted = equations.moments(fitted), dense.moments(equations.totals[-1])
    varies = _varies(*found) & _varies(*wanted)
    scale = torch.where(varies, wanted[1] / found[1], 1.0).sqrt().clamp(1 / _MAX_SCALE, _MAX_SCALE)
    change[:, :-1].addcmul_(fitted, scale - 1)
    change[:, -1:].sub_((scale - 1) * found[0])


def _varies(mean: torch.Tensor, variance: torch.Tensor) -> torch.Tensor:
    return variance > _CONSTANT * (mean.square() + variance)
