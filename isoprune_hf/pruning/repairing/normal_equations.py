"""The sums over inputs and outputs of a layer that a least-squares fit needs, and the solution of the fit.

`fit_sums` computes the sums of some rows, `solve_fit` solves for the change of the layer, and `prefers_bias` decides
between weights and bias. With x the features of each group of outputs (the last one is the number 1) and y - W x the
part of the outputs that is missing, the sums are, in float64: `inputs` = sum x x^T, `missing` = sum x (y - W x)^T,
`energy` = sum of squared outputs, `residual` = sum (y - W x)^2 and `count` = number of rows.
"""

from collections.abc import Iterator

import torch
from torch import nn
from torch.nn import functional

_RIDGE = 1e-2  # share of a feature's mean square
_RIDGE_FLOOR = 1e-8  # added for each row: the ridge of a feature that is always 0 would be 0
# Rows for each feature. Below the first number only a bias is fitted: the layers before have adapted to these very
# images, which no half of them can show. Above the second one there is nothing to overfit.
_MIN_ROWS_FOR_WEIGHTS = 1.5
_ROWS_WITHOUT_OVERFITTING = 20
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


def pieces_of_halves(module: FittedModule, x: torch.Tensor) -> Iterator[tuple[int, slice]]:
    """Yield (half, piece) for both halves of a batch x, in pieces of at most `_MAX_UNFOLDED_ELEMENTS`."""
    window = module.kernel_size[0] * module.kernel_size[1] if isinstance(module, nn.Conv2d) else 1
    step = max(1, _MAX_UNFOLDED_ELEMENTS // max(1, x[0].numel() * window))
    for half, (begin, end) in enumerate(((0, len(x) // 2), (len(x) // 2, len(x)))):
        yield from ((half, slice(start, min(start + step, end))) for start in range(begin, end, step))


def fit_sums(module: FittedModule, x: torch.Tensor, output: torch.Tensor, missing: torch.Tensor, dim: int) -> FitSums:
    """Compute the sums of the module over all rows of a batch.

    Args:
        module: The layer.
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
    features = _features(module, x, output, dim)
    features = torch.cat([features, torch.ones_like(features[..., :1])], dim=-1)
    return {
        "inputs": torch.bmm(features.mT, features).double(),
        "missing": torch.bmm(features.mT, missing).double(),
        "energy": rows.square().sum().double(),
        "residual": missing.square().sum().double(),
        "count": torch.tensor(features.shape[1], dtype=torch.float64, device=x.device),
    }


def solve_fit(sums: FitSums, *, is_bias_only: bool) -> torch.Tensor:
    """Solve for the change of a layer: (G, F + 1, O), the last feature being the number 1.

    With `is_bias_only`, solve for the last feature only: (G, 1, O).
    """
    inputs = sums["inputs"]
    missing = sums["missing"]
    if is_bias_only:
        inputs = inputs[:, -1:, -1:]
        missing = missing[:, -1:]
    energy = inputs.diagonal(dim1=1, dim2=2)
    damping = _RIDGE * energy + _RIDGE_FLOOR * sums["count"]
    solution: torch.Tensor = torch.linalg.solve(inputs + torch.diag_embed(damping), missing)
    return solution


def prefers_bias(first: FitSums, second: FitSums) -> bool:
    """Decide from two halves of a sample whether only the bias is fitted, and no weights.

    That is so if there are few rows for the features that are not always 0, and, unless there are plenty, if a bias
    fitted to one half removes more of the error of the other half than weights do.
    """
    energy = first["inputs"].diagonal(dim1=1, dim2=2) + second["inputs"].diagonal(dim1=1, dim2=2)
    rows = (first["count"] + second["count"]) / (energy > 0).sum(dim=1).max()
    if not _MIN_ROWS_FOR_WEIGHTS <= rows < _ROWS_WITHOUT_OVERFITTING:
        return bool(rows < _MIN_ROWS_FOR_WEIGHTS)
    if not first["count"] or not second["count"]:
        return False  # one image says nothing about others
    gains = [
        _gain(first, second, is_bias_only=is_bias_only) + _gain(second, first, is_bias_only=is_bias_only)
        for is_bias_only in (True, False)
    ]
    return gains[0] > gains[1]


def _gain(own: FitSums, other: FitSums, *, is_bias_only: bool) -> float:
    """Compute how much of the squared error of one half is removed by the change fitted to the other."""
    change = solve_fit(own, is_bias_only=is_bias_only)
    size = change.shape[1]
    inputs = other["inputs"][:, -size:, -size:]
    missing = other["missing"][:, -size:]
    return float((change * (2 * missing - inputs @ change)).sum().item())


def _features(module: FittedModule, x: torch.Tensor, output: torch.Tensor, dim: int) -> torch.Tensor:
    """Return the features from which each group of outputs is computed: (G, N, F)."""
    if isinstance(module, nn.Linear):
        return x.reshape(1, -1, x.shape[-1])
    if isinstance(module, nn.LayerNorm):  # a scale and a shift of each channel
        return output.movedim(dim, -1).reshape(-1, output.shape[dim], 1).transpose(0, 1)
    mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
    # The padding in the order that `pad` expects; torch 2.12 has no public name for it.
    x = functional.pad(x, module._reversed_padding_repeated_twice, mode=mode)
    patches = functional.unfold(x, module.kernel_size, module.dilation, 0, module.stride)
    return torch.unflatten(patches, 1, (module.groups, -1)).permute(1, 0, 3, 2).flatten(1, 2)


def _groups_of(module: nn.Linear | nn.Conv2d) -> int:
    return module.groups if isinstance(module, nn.Conv2d) else 1
