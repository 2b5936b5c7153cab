"""The sums over inputs and outputs of a layer that a least-squares fit needs, and the solution of the fit.

`fit_sums` computes the sums of some rows, `choose_ridge` compares fits of each half of the images on the other half,
and `solve_fit` solves for the change of the layer. With x the features of each group of outputs (the last one is the
number 1) and y - W x the part of the outputs that is missing, the sums are, in float64: `inputs` = sum x x^T,
`missing` = sum x (y - W x)^T, `energy` = sum of squared outputs, `residual` = sum (y - W x)^2 and `count` = number of
rows.
"""

import math
from collections.abc import Iterator
from functools import cache

import torch
from torch import nn

from isoprune_hf.pruning.repairing.functional_calls import Window

# Shares of a feature's variance. The last one fits the bias alone, as ever larger shares do.
RIDGES = (0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, math.inf)
# Added to it, as a share of a feature's mean square, and for each row: the ridge of a feature that is always the same
# would be 0.
_CONSTANT_FLOOR = 1e-6
_RIDGE_FLOOR = 1e-8
_RIDGE_OF_ONE_HALF = 0.1
_MAX_COMPARED_OUTPUTS = 128
_MAX_UNFOLDED_ELEMENTS = 2**26

FittedModule = nn.Linear | nn.Conv2d | nn.LayerNorm
FitSums = dict[str, torch.Tensor]


def zero_fit_sums(module: FittedModule, device: torch.device) -> FitSums:
    """Return the sums of no rows, for G groups of F features and O outputs."""
    if isinstance(module, nn.LayerNorm):
        groups = len(module.weight)
        features = 1
        outputs = 1
    else:
        groups = _groups_of(module)
        features = module.weight[0].numel()
        outputs = len(module.weight) // groups
    shapes: dict[str, tuple[int, ...]] = {
        "inputs": (groups, features + 1, features + 1),
        "missing": (groups, features + 1, outputs),
        "energy": (),
        "residual": (),
        "count": (),
    }
    return {name: torch.zeros(shape, dtype=torch.float64, device=device) for name, shape in shapes.items()}


def pieces_of_halves(window: Window | None, x: torch.Tensor) -> Iterator[tuple[int, slice]]:
    """Yield (half, piece) for both halves of a batch x, in pieces of at most `_MAX_UNFOLDED_ELEMENTS`."""
    copies = 1 if window is None else math.prod(window.kernel)
    step = max(1, _MAX_UNFOLDED_ELEMENTS // max(1, x[0].numel() * copies))
    for half, (begin, end) in enumerate(((0, len(x) // 2), (len(x) // 2, len(x)))):
        yield from ((half, slice(start, min(start + step, end))) for start in range(begin, end, step))


def fit_sums(
    module: FittedModule,
    window: Window | None,
    *,
    x: torch.Tensor,
    output: torch.Tensor,
    missing: torch.Tensor,
    dim: int,
) -> FitSums:
    """Compute the sums of a layer over all rows of a batch.

    Args:
        module: The layer.
        window: Settings of a convolution; None for other layers.
        x: Its input.
        output: Its output.
        missing: What the output lacks, of the same shape.
        dim: Dim of the outputs on which the channels lie.
    """
    groups = output.shape[dim] if isinstance(module, nn.LayerNorm) else _groups_of(module)
    rows, missing = (
        value.movedim(dim, -1).reshape(-1, groups, value.shape[dim] // groups).transpose(0, 1)
        for value in (output, missing)
    )
    if isinstance(module, nn.LayerNorm):  # a scale and a shift of each channel
        features = output.movedim(dim, -1).reshape(-1, output.shape[dim], 1).transpose(0, 1)
    else:
        features = x.reshape(1, -1, x.shape[-1]) if window is None else window.patches(x)
    features = torch.cat([features, torch.ones_like(features[..., :1])], dim=-1)
    return {
        "inputs": torch.bmm(features.mT, features).double(),
        "missing": torch.bmm(features.mT, missing).double(),
        "energy": rows.square().sum().double(),
        "residual": missing.square().sum().double(),
        "count": torch.tensor(features.shape[1], dtype=torch.float64, device=x.device),
    }


def choose_ridge(first: FitSums, second: FitSums, *, has_shift: bool) -> float | None:
    """Return the ridge of `RIDGES` by cross-validation between the halves of a sample.

    Each fit to one half removes a part of the squared error of the other half; the sum of both is compared. The best
    ridge is searched from the middle of the finite ones in the direction in which it improves.

    Args:
        first: Sums over one half of the images.
        second: Sums over the other half.
        has_shift: The layer has a bias to fit.

    Returns:
        None if no fit removes any error: the layer is then best left as it is.
    """
    if not first["count"] or not second["count"]:
        return _RIDGE_OF_ONE_HALF  # one image says nothing about others
    halves = _with_some_outputs(first), _with_some_outputs(second)

    @cache
    def gain(at: int) -> float:
        fits = (solve_fit(half, RIDGES[at], has_shift=has_shift) for half in halves)
        total = sum(_gain(change, other) for change, other in zip(fits, reversed(halves), strict=True))
        return -math.inf if math.isnan(total) else total  # a fit that cannot be solved is worse than any other

    last = len(RIDGES) - 1
    best = last // 2
    for step in (1, -1):
        while 0 <= best + step <= last and gain(best + step) > gain(best):
            best += step
    best = max(best, last, key=gain)
    return RIDGES[best] if gain(best) > 0 else None


def _with_some_outputs(sums: FitSums) -> FitSums:
    """Return sums with at most `_MAX_COMPARED_OUTPUTS` outputs of each group, evenly spaced."""
    step = -(-sums["missing"].shape[-1] // _MAX_COMPARED_OUTPUTS)
    return {**sums, "missing": sums["missing"][..., ::step]}


def solve_fit(sums: FitSums, ridge: float, *, has_shift: bool) -> torch.Tensor:
    """Solve for the change of a layer: (G, F + 1, O), the last feature being the number 1.

    The ridge is a share of the variance of each feature; the change of the bias is not damped. With an infinite ridge,
    solve for the last feature only: (G, 1, O). Without a shift, the last row is 0.
    """
    count = sums["count"]
    products = sums["inputs"][:, :-1, :-1]
    missing = sums["missing"][:, :-1]
    mean = sums["inputs"][:, :-1, -1:] / count
    shift = sums["missing"][:, -1:] / count
    if not has_shift:
        mean = torch.zeros_like(mean)
        shift = torch.zeros_like(shift)
    if math.isinf(ridge):
        return shift
    energy = products.diagonal(dim1=1, dim2=2)
    products = products - count * mean @ mean.mT
    damping = ridge * products.diagonal(dim1=1, dim2=2) + _CONSTANT_FLOOR * energy + _RIDGE_FLOOR * count
    factor, failed = torch.linalg.cholesky_ex(products + torch.diag_embed(damping))
    weights = torch.cholesky_solve(missing - count * mean @ shift, factor)
    weights = weights.masked_fill(failed.ne(0)[:, None, None], math.nan)
    return torch.cat([weights, shift - mean.mT @ weights], dim=1)


def _gain(change: torch.Tensor, sums: FitSums) -> float:
    """Compute how much of the squared error of some rows a change removes."""
    size = change.shape[1]
    inputs = sums["inputs"][:, -size:, -size:]
    missing = sums["missing"][:, -size:]
    return float((change * (2 * missing - inputs @ change)).sum().item())


def _groups_of(module: nn.Linear | nn.Conv2d) -> int:
    return module.groups if isinstance(module, nn.Conv2d) else 1
