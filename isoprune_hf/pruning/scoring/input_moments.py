"""Moments of the inputs of layers (`InputMoments`), from which some channels are predicted by others.

After a cut, a least-squares fit of the next layer makes up for the part of the removed channels that follows from the
kept ones. The same is done here to the input of that layer, without changing a weight: the removed channels are
replaced by their linear prediction from the kept ones.
"""

from dataclasses import dataclass
from typing import NamedTuple, Self

import torch
from accelerate import Accelerator
from torch import nn

from isoprune_hf.pruning.calibration.gradients import sum_over_ranks

_ROWS = 64  # positions of each image
_RIDGE = 1e-3  # share of the variance of a channel
_FLOOR = 1e-6  # share of the mean square: the variance of a constant channel is 0


class Prediction(NamedTuple):
    """Removed channels as a linear function of the kept ones.

    Args:
        kept: Positions of the kept channels.
        removed: Positions of the removed ones.
        weights: (kept, removed).
        bias: (removed,).
    """

    kept: torch.Tensor
    removed: torch.Tensor
    weights: torch.Tensor
    bias: torch.Tensor

    def replace(self, x: torch.Tensor, dim: int) -> torch.Tensor:
        """Return a copy of an input of a layer, with channels on a dim, in which the removed ones are predicted.

        The copy has the layout of the input, so the layer's output has the one that a `view` after it may need.
        """
        predicted = x.movedim(dim, -1)[..., self.kept] @ self.weights.to(x.dtype) + self.bias.to(x.dtype)
        return x.index_copy(dim, self.removed, predicted.movedim(-1, dim))


@dataclass(eq=False)
class InputMoments:
    """Sums over positions of images.

    Args:
        products: Sum of x x^T, the last element of x being the number 1: (channels + 1, channels + 1), in float64.
    """

    products: torch.Tensor

    @classmethod
    def empty(cls, channels: int, device: torch.device) -> Self:
        """Return the sums of no rows."""
        return cls(torch.zeros(channels + 1, channels + 1, dtype=torch.float64, device=device))

    def add(self, x: torch.Tensor, dim: int, images: int) -> None:
        """Add evenly spaced positions of an input of so many images, in place; the channels lie on `dim`."""
        rows = x.movedim(dim, -1).flatten(0, -2)
        rows = rows[:: max(1, len(rows) // (_ROWS * images))].float()
        rows = torch.cat([rows, torch.ones_like(rows[:, :1])], dim=1)
        with torch.autocast(rows.device.type, enabled=False):
            self.products += rows.T @ rows

    def add_ranks(self, accelerator: Accelerator | None) -> None:
        """Add the sums of all other ranks, in place; each rank must call this."""
        self.products = sum_over_ranks(self.products, accelerator)

    def predict(self, kept: torch.Tensor, removed: torch.Tensor) -> Prediction:
        """Predict channels from others, by a ridge regression with more damping the fewer rows there are."""
        count = self.products[-1, -1]
        mean = self.products[-1, :-1] / count
        read = self.products[kept][:, kept] / count - torch.outer(mean[kept], mean[kept])
        wanted = self.products[kept][:, removed] / count - torch.outer(mean[kept], mean[removed])
        damping = (_RIDGE + len(kept) / count) * read.diagonal() + _FLOOR * (read.diagonal() + mean[kept].square())
        factor, failed = torch.linalg.cholesky_ex(read + torch.diag(damping + torch.finfo(torch.float32).tiny))
        weights = torch.cholesky_solve(wanted, factor)
        if failed or not weights.isfinite().all():
            weights = torch.zeros_like(wanted)
        return Prediction(kept, removed, weights, mean[removed] - mean[kept] @ weights)


def channel_dim(layer: nn.Module, x: torch.Tensor) -> int:
    """Return the dim of the channels of an input or output of a layer."""
    return x.ndim - 1 if isinstance(layer, nn.Linear) else 1
