"""The sums over inputs and outputs of a layer that a fit by least squares needs, and what follows from them.

With x the features of each group of outputs (the last one is the number 1) and y - W x what the outputs lack, `inputs`
is sum x x^T and `missing` is sum x (y - W x)^T, in float64.
"""

from collections.abc import Iterator

import torch
from torch import nn
from torch.nn import functional

_RIDGE = 1e-2
_FLOOR = 1e-8  # of a feature's mean square: a dead channel leaves nothing to divide by
# Rows for each feature: with few of them the layers before have learnt the images by heart, which no half shows; with
# plenty there is nothing to learn by heart.
_FEW, _PLENTY = 1.5, 20
_ELEMENTS = 2**26  # of unfolded inputs at once

Sums = dict[str, torch.Tensor]


def no_sums(module: nn.Module, device: torch.device) -> Sums:
    """Sums of no image, for G groups of F features and O outputs."""
    if isinstance(module, nn.LayerNorm):
        groups, features, outputs = len(module.weight), 1, 1
    else:
        groups = getattr(module, "groups", 1)
        features, outputs = module.weight[0].numel(), len(module.weight) // groups
    shapes = {"inputs": (groups, features + 1, features + 1), "missing": (groups, features + 1, outputs)}
    scalars = dict.fromkeys(("energy", "residual", "count"), ())
    return {name: torch.zeros(shape, dtype=torch.float64, device=device) for name, shape in (shapes | scalars).items()}


def halves_of(module: nn.Module, x: torch.Tensor) -> Iterator[tuple[int, slice]]:
    """Pieces of both halves of a batch, whose unfolded inputs are not too large."""
    window = module.kernel_size[0] * module.kernel_size[1] if isinstance(module, nn.Conv2d) else 1
    step = max(1, _ELEMENTS // max(1, x[0].numel() * window))
    for half, (begin, end) in enumerate(((0, len(x) // 2), (len(x) // 2, len(x)))):
        yield from ((half, slice(start, min(start + step, end))) for start in range(begin, end, step))


def add_up(module: nn.Module, x: torch.Tensor, output: torch.Tensor, missing: torch.Tensor, dim: int) -> Sums:
    """The sums that a fit needs, over rows of features (G, N, F) and of outputs (G, N, O)."""
    groups = getattr(module, "groups", 1) if not isinstance(module, nn.LayerNorm) else output.shape[dim]
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


def _features(module: nn.Module, x: torch.Tensor, output: torch.Tensor, dim: int) -> torch.Tensor:
    """What each group of outputs is made of: (G, N, F)."""
    if isinstance(module, nn.Linear):
        return x.reshape(1, -1, x.shape[-1])
    if isinstance(module, nn.LayerNorm):  # a scale and a shift of each channel
        return output.movedim(dim, -1).reshape(-1, output.shape[dim], 1).transpose(0, 1)
    mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
    x = functional.pad(x, module._reversed_padding_repeated_twice, mode=mode)
    patches = functional.unfold(x, module.kernel_size, module.dilation, 0, module.stride)
    return patches.unflatten(1, (module.groups, -1)).permute(1, 0, 3, 2).flatten(1, 2)


def solve(sums: Sums, is_bias_only: bool) -> torch.Tensor:
    """Solve for what is to be added: (G, F + 1, O), the last feature being the number 1; or its last row alone."""
    inputs, missing = sums["inputs"], sums["missing"]
    if is_bias_only:
        inputs, missing = inputs[:, -1:, -1:], missing[:, -1:]
    energy = inputs.diagonal(dim1=1, dim2=2)
    damping = _RIDGE * energy + _FLOOR * sums["count"]
    return torch.linalg.solve(inputs + torch.diag_embed(damping), missing)


def holds_for_bias_alone(*halves: Sums) -> bool:
    """Say whether two halves of a sample determine a bias and no weights.

    So it is where there are few rows for the features that are not always 0, and, unless there are plenty, where a
    bias that was fitted to one half takes more of the error of the other half than all weights would.
    """
    energy = sum(sums["inputs"].diagonal(dim1=1, dim2=2) for sums in halves)
    rows = sum(sums["count"] for sums in halves) / (energy > 0).sum(dim=1).max()
    if not _FEW <= rows < _PLENTY:
        return bool(rows < _FEW)
    gains = []
    for is_bias_only in (True, False):
        gain = 0.0
        for own, other in (halves, halves[::-1]):
            if not own["count"] or not other["count"]:
                return False  # one image tells nothing about others
            change = solve(own, is_bias_only)
            size = change.shape[1]
            inputs, missing = other["inputs"][:, -size:, -size:], other["missing"][:, -size:]
            gain += (change * (2 * missing - inputs @ change)).sum().item()
        gains.append(gain)
    return gains[0] > gains[1]
