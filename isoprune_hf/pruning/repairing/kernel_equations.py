"""The dual form of a least-squares fit (`KernelEquations`), whose matrix has the size of the number of rows.

With centred rows X (N, F) and Y (N, O), the solution of the normal equations is, for a diagonal damping D > 0,

    (X^T X + D)^-1 X^T Y = D^-1 X^T (X D^-1 X^T + 1)^-1 Y.

For fewer rows than features the right side needs less memory and time.

Source:
    Saunders et al., Ridge Regression Learning Algorithm in Dual Variables, ICML 1998.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Self

import torch
from accelerate import Accelerator

from isoprune_hf.pruning.calibration.gradients import sum_over_ranks
from isoprune_hf.pruning.repairing.equations import FLOAT64_BYTES, damping, solve_positive
from isoprune_hf.pruning.repairing.fitted_rows import FitSize, Rows

_KERNELS = 2  # the kernel and its Cholesky factor
_SOLUTIONS = 3  # of features by outputs: the weights and their copies


@dataclass(eq=False)
class KernelEquations:
    """Rows, in the type of the layer: see `Equations`.

    Args:
        features: Pieces of the features (G, N, F + 1); the last one is the number 1.
        missing: Pieces of the missing outputs (G, N, O).
        totals: Totals of the rows.
    """

    features: list[torch.Tensor]
    missing: list[torch.Tensor]
    totals: torch.Tensor

    @classmethod
    def empty(cls, size: FitSize, device: torch.device) -> Self:
        """Return the equations of no rows."""
        features, missing = (
            torch.zeros(size.groups, 0, width, dtype=size.dtype, device=device)
            for width in (size.features + 1, size.outputs)
        )
        return cls([features], [missing], torch.zeros(3, dtype=torch.float64, device=device))

    @staticmethod
    def bytes_of(size: FitSize, rows: int) -> int:
        """Return an upper bound of the bytes of a fit to so many rows of all ranks."""
        width = size.features + 1 + size.outputs
        stored = rows * width * size.dtype.itemsize
        solved = rows * (width + size.outputs) + _KERNELS * rows**2 + _SOLUTIONS * (size.features + 1) * size.outputs
        return size.groups * (stored + FLOAT64_BYTES * solved)

    def add(self, rows: Rows) -> None:
        """Add rows, in place."""
        self.features.append(rows.features)
        self.missing.append(rows.missing)
        self.totals += rows.totals()

    def add_ranks(self, accelerator: Accelerator | None) -> None:
        """Add the rows of all other ranks, in place; those of rank 0 come first."""
        self.features, self.missing = (_of_ranks(pieces, accelerator) for pieces in (self.features, self.missing))
        self.totals = sum_over_ranks(self.totals, accelerator)

    def absorb(self, other: Self) -> None:
        """Add the rows of other equations, in place."""
        self.features += other.features
        self.missing += other.missing
        self.totals += other.totals

    def with_some_outputs(self, most: int) -> Self:
        """Return the equations of at most so many outputs of each group, evenly spaced."""
        step = -(-self.missing[0].shape[-1] // most)
        return replace(self, missing=[piece[..., ::step] for piece in self.missing])

    def is_finite(self) -> bool:
        """Return whether all features and missing outputs are finite."""
        return all(bool(values.isfinite().all()) for values in (*self.features, *self.missing, self.totals))

    def solve(self, ridge: float, *, has_shift: bool) -> torch.Tensor:
        """Solve (X D^-1 X^T + 1) A = Y; the change of the weights is D^-1 X^T A (see `Equations.solve`)."""
        count = self.totals[-1]
        missing = torch.cat(self.missing, 1).double()
        shift = missing.mean(1, keepdim=True) if has_shift else torch.zeros_like(missing[:, :1])
        if math.isinf(ridge):
            return shift
        x = _joined(self.features)
        mean = x.mean(1, keepdim=True) if has_shift else torch.zeros_like(x[:, :1])
        x -= mean
        variance = torch.linalg.vector_norm(x, dim=1, keepdim=True).square()
        root = damping(ridge, variance, variance + count * mean.square(), count).rsqrt()
        x *= root
        kernel = x @ x.mT
        kernel.diagonal(dim1=1, dim2=2).add_(1)
        weights = x.mT @ solve_positive(kernel, missing - shift)
        weights *= root.mT
        return torch.cat([weights, shift - mean @ weights], dim=1)

    def gain(self, change: torch.Tensor) -> float:
        """Compute how much of the squared error of the rows a change removes."""
        total = 0.0
        for features, missing in zip(self.features, self.missing, strict=True):
            added = features[..., -change.shape[1] :].double() @ change
            total += float((added * (2 * missing - added)).sum().item())
        return total

    def moments(self, weights: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Compute mean and variance of the outputs of weights; see `Equations.moments`."""
        outputs = torch.cat([piece[..., :-1].double() @ weights for piece in self.features], 1)
        variance, mean = torch.var_mean(outputs, dim=1, correction=0, keepdim=True)
        return mean, variance


def _joined(pieces: Sequence[torch.Tensor]) -> torch.Tensor:
    """Return the features of pieces (G, N, F) in float64, without the last one."""
    rows = sum(piece.shape[1] for piece in pieces)
    first = pieces[0]
    joined = torch.empty(len(first), rows, first.shape[-1] - 1, dtype=torch.float64, device=first.device)
    return torch.cat([piece[..., :-1] for piece in pieces], 1, out=joined)


def _of_ranks(pieces: list[torch.Tensor], accelerator: Accelerator | None) -> list[torch.Tensor]:
    """Return the pieces (G, N, F) of all ranks, by a sum of rows that are 0 at the places of other ranks."""
    if accelerator is None or accelerator.num_processes == 1:
        return pieces
    own = torch.cat(pieces, 1)
    counts = torch.zeros(accelerator.num_processes, dtype=torch.int64, device=own.device)
    counts[accelerator.process_index] = own.shape[1]
    ends = sum_over_ranks(counts, accelerator).cumsum(0).tolist()
    end = ends[accelerator.process_index]
    rows = own.new_zeros(len(own), ends[-1], own.shape[-1])
    rows[:, end - own.shape[1] : end] = own
    return [sum_over_ranks(rows, accelerator)]
