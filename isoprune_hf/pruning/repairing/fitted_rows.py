"""The rows of a least-squares fit: the features that a layer reads and what its outputs lack (`Rows`).

`rows_of` computes them for one call of a layer, and `FitSize` is the size of a fit, from which its cost follows.
"""

import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import nn

from isoprune_hf.pruning.repairing.functional_calls import Window

_MAX_UNFOLDED_ELEMENTS = 2**26

FittedModule = nn.Linear | nn.Conv2d | nn.LayerNorm


class FitSize(NamedTuple):
    """The size of a fit.

    Args:
        groups: Number of groups of outputs with features of their own.
        features: Features of each group, without the number 1 by which the bias is fitted; 0 fits the bias alone.
        outputs: Outputs of each group.
        dtype: Type of the layer's weight.
    """

    groups: int
    features: int
    outputs: int
    dtype: torch.dtype


class Rows(NamedTuple):
    """Rows of a fit of F features and O outputs in each of G groups.

    Args:
        features: (G, N, F + 1); the last feature is the number 1.
        output: Outputs of the layer (G, N, O).
        missing: What the outputs lack, of the same shape.
    """

    features: torch.Tensor
    output: torch.Tensor
    missing: torch.Tensor

    def totals(self) -> torch.Tensor:
        """Return the sums of the squares of outputs and of what they lack, and the number of rows: (3,), float64."""
        sums = [values.square().sum().double() for values in (self.output, self.missing)]
        return torch.stack([*sums, sums[0].new_tensor(self.features.shape[1])])


def size_of(module: FittedModule, *, is_bias_only: bool = False) -> FitSize:
    """Return the size of the fit of a layer; a LayerNorm has a scale and a shift of each channel."""
    weight = module.weight
    groups = module.groups if isinstance(module, nn.Conv2d) else 1
    if isinstance(module, nn.LayerNorm):
        groups = len(weight)
    features = 0 if is_bias_only else weight[0].numel()  # 1 of each channel of a LayerNorm
    return FitSize(groups, features, len(weight) // groups, weight.dtype)


def pieces_of_halves(window: Window | None, x: torch.Tensor) -> Iterator[tuple[int, slice]]:
    """Yield (half, piece) for both halves of a batch x, in pieces of at most `_MAX_UNFOLDED_ELEMENTS`."""
    copies = 1 if window is None else math.prod(window.kernel)
    step = max(1, _MAX_UNFOLDED_ELEMENTS // max(1, x[0].numel() * copies))
    for half, (begin, end) in enumerate(((0, len(x) // 2), (len(x) // 2, len(x)))):
        yield from ((half, slice(start, min(start + step, end))) for start in range(begin, end, step))


def rows_of(
    module: FittedModule,
    window: Window | None,
    size: FitSize,
    *,
    x: torch.Tensor,
    output: torch.Tensor,
    missing: torch.Tensor,
    dim: int,
) -> Rows:
    """Compute the rows of one call of a layer.

    Args:
        module: The layer.
        window: Settings of a convolution; None for other layers.
        size: Size of the fit.
        x: Input of the layer.
        output: Its output.
        missing: What the output lacks, of the same shape.
        dim: Dim of the outputs on which the channels lie.
    """
    output, missing = (
        value.movedim(dim, -1).reshape(-1, size.groups, size.outputs).transpose(0, 1) for value in (output, missing)
    )
    features = output.new_ones(*output.shape[:2], size.features + 1)
    if not size.features:
        return Rows(features, output, missing)
    if isinstance(module, nn.LayerNorm):
        features[..., :-1] = output
    elif window is None:
        features[..., :-1] = x.reshape(-1, x.shape[-1])
    else:  # one copy: the patches of a convolution may be 49 times larger than its input
        patches = window.patches(x)
        places = torch.unflatten(features[..., :-1], 1, patches.shape[1:4])
        torch.unflatten(places, -1, patches.shape[4:]).copy_(patches)
    return Rows(features, output, missing)


class WaitingRows:
    """Rows that are passed on once they are at least as many as their features.

    The equations of a fit have the size of the features squared: to add few rows takes as long as to add many. Rows
    that wait do so in float64, so that their products do not depend on the others that they are joined with, and a
    repair not on the number of ranks.

    Args:
        size: Size of the fit.
        receivers: Called with rows.
    """

    def __init__(self, size: FitSize, *receivers: Callable[[Rows], None]):
        self._enough, self._receivers = size.features, receivers
        self._waiting: list[Rows] = []

    def add(self, rows: Rows) -> None:
        """Add rows."""
        if rows.features.shape[1] >= self._enough:
            self._pass_on(rows)
            return
        self._waiting.append(Rows(*(values.double() for values in rows)))
        if sum(each.features.shape[1] for each in self._waiting) >= self._enough:
            self.flush()

    def flush(self) -> None:
        """Pass on the rows that wait."""
        if self._waiting:
            self._pass_on(Rows(*(torch.cat(values, 1) for values in zip(*self._waiting, strict=True))))
            self._waiting.clear()

    def _pass_on(self, rows: Rows) -> None:
        for receive in self._receivers:
            receive(rows)
