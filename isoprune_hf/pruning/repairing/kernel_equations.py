"""The dual form of a least-squares fit (`KernelEquations`), whose matrix has the size of the number of rows.

For fewer rows than features it needs less memory and time: see `centred_rows`.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import torch
from accelerate import Accelerator

from isoprune_hf.pruning.calibration.gradients import sum_over_ranks
from isoprune_hf.pruning.repairing.centred_rows import CentredRows, solve_scaled
from isoprune_hf.pruning.repairing.equations import FLOAT64_BYTES, compared_type, damping
from isoprune_hf.pruning.repairing.fitted_rows import FitSize, Rows

_KERNELS = 2  # the kernel and its Cholesky factor
_COMPARED = 1.5  # rows in the type of the layer: centred ones of each half, and scaled ones of one half
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
        compared = math.ceil(_COMPARED * compared_type(size.dtype).itemsize)
        joined = rows * width * (size.dtype.itemsize + max(FLOAT64_BYTES, compared))
        solved = rows * size.outputs + _KERNELS * rows**2 + _SOLUTIONS * (size.features + 1) * size.outputs
        return size.groups * (joined + FLOAT64_BYTES * solved)

    def add(self, rows: Rows) -> None:
        """Add rows, in place."""
        dtype = self.features[0].dtype
        self.features.append(rows.features.to(dtype))
        self.missing.append(rows.missing.to(dtype))
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

    def with_some_outputs(self, most: int) -> CentredRows:
        """Return a fit of at most so many outputs of each group, evenly spaced; its rows have the layer's type."""
        step = -(-self.missing[0].shape[-1] // most)
        missing = torch.cat([piece[..., ::step] for piece in self.missing], 1).double()
        features, dtype = _joined(self.features), compared_type(self.features[0].dtype)
        mean, shift = (values.mean(1, keepdim=True) for values in (features, missing))
        features -= mean
        variance = torch.linalg.vector_norm(features, dim=1, keepdim=True).square()
        rest = (missing - shift).to(dtype)
        return CentredRows(features.to(dtype), rest, mean, shift, variance, self.totals[-1])

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
        weights = solve_scaled(x, missing - shift, root)
        return torch.cat([weights, shift - mean @ weights], dim=1)

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
