"""Choose the form of a least-squares fit by its cost (`form_of_fit`), and its ridge by cross-validation.

`RidgeSearch` chooses the ridges of all layers of a network, `choose_ridge` that of one.
`solve_within_bounds` raises the ridge of a fit that would make the weights of a layer many times larger.
"""

import math
from functools import cache

import torch

from isoprune_hf.pruning.repairing.equations import Equations
from isoprune_hf.pruning.repairing.fitted_rows import FitSize
from isoprune_hf.pruning.repairing.kernel_equations import KernelEquations
from isoprune_hf.pruning.repairing.normal_equations import NormalEquations

# Shares of a feature's variance. The last one fits the bias alone, as ever larger shares do.
RIDGES = (0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, math.inf)
_MIDDLE = 0.3
_RIDGE_OF_ONE_HALF = 0.1
_MAX_COMPARED_OUTPUTS = 128
# Largest norm of the weights of a layer, as a multiple of the norm after the cut. In a trained network fits made it at
# most 1.3 times larger. Much larger weights follow from directions in which the sample hardly varies and others do.
MAX_GROWTH = 4.0
_ROWS_PER_FEATURE = 0.5  # below it the dual form takes less time


def form_of_fit(size: FitSize, rows: int, max_bytes: int) -> type[Equations] | None:
    """Return the faster form of a fit, or the other one if the first needs too much memory.

    Args:
        size: Size of the fit.
        rows: Rows of all ranks.
        max_bytes: Largest number of bytes of equations and solution.

    Returns:
        None if both need too much.
    """
    forms: list[type[Equations]] = [NormalEquations, KernelEquations]
    if rows < _ROWS_PER_FEATURE * size.features:
        forms.reverse()
    return next((form for form in forms if form.bytes_of(size, rows) <= max_bytes), None)


def choose_ridge(first: Equations, second: Equations, *, has_shift: bool, start: float = _MIDDLE) -> float | None:
    """Return the ridge of `RIDGES` by cross-validation between the halves of a sample.

    Each fit to one half removes a part of the squared error of the other half; the sum of both is compared. The best
    of the finite ridges is searched from one of them in the direction in which it improves, and the infinite one is
    taken if it is better still. Where a fit cannot be solved, larger ridges are tried.

    Args:
        first: Equations of one half of the images.
        second: Those of the other half, in the same form.
        has_shift: The layer has a bias to fit.
        start: The ridge to compare with its neighbours first. Each comparison costs two solutions, so one near the
            best ridge saves time.

    Returns:
        None if no fit removes any error: the layer is then best left as it is.
    """
    if not first.totals[-1] or not second.totals[-1]:
        return _RIDGE_OF_ONE_HALF  # one image says nothing about others
    halves = [half.with_some_outputs(_MAX_COMPARED_OUTPUTS) for half in (first, second)]

    @cache
    def gain(at: int) -> float:
        pairs = zip(halves, reversed(halves), strict=True)
        total = sum(other.gain(half.solve(RIDGES[at], has_shift=has_shift)) for half, other in pairs)
        return -math.inf if math.isnan(total) else total  # a fit that cannot be solved is worse than any other

    last = len(RIDGES) - 1
    best = min(RIDGES.index(start), last - 1)
    while gain(best) == -math.inf and best < last - 1:
        best += 1
    for step in (1, -1):
        while 0 <= best + step < last and gain(best + step) > gain(best):
            best += step
    best = max(best, last, key=gain)
    return RIDGES[best] if gain(best) > 0 else None


class RidgeSearch:
    """Chooses the ridges of the layers of a network, in turn.

    Each search starts from the ridge that was chosen last for a layer of the same kind, one whose path differs in
    the numbers of blocks only: the layers of repeated blocks have similar ridges. After a layer without one, the next
    search starts from the largest.
    """

    def __init__(self) -> None:
        self._chosen: dict[str, float] = {}

    def choose(self, name: str, first: Equations, second: Equations, *, has_shift: bool) -> float | None:
        """Return the ridge of the layer at a path; see `choose_ridge`."""
        kind = ".".join(part for part in name.split(".") if not part.isdigit())
        ridge = choose_ridge(first, second, has_shift=has_shift, start=self._chosen.get(kind, _MIDDLE))
        self._chosen[kind] = math.inf if ridge is None else ridge
        return ridge


def solve_within_bounds(equations: Equations, weights: torch.Tensor, ridge: float, *, has_shift: bool) -> torch.Tensor:
    """Solve for the change of a layer with a ridge that bounds the weights by `MAX_GROWTH`.

    Args:
        equations: The equations of all images.
        weights: Weights of the layer before the fit (G, F, O).
        ridge: The ridge to try first; then the larger ones of `RIDGES` are, in order.
        has_shift: The layer has a bias to fit.

    Returns:
        The change (G, F + 1, O), or (G, 1, O) with an infinite ridge; see `Equations.solve`.
    """
    largest = MAX_GROWTH * float(weights.double().norm())
    for tried in (ridge, *(larger for larger in RIDGES if larger > ridge)):
        change = equations.solve(tried, has_shift=has_shift)
        if math.isinf(tried) or not float((weights + change[:, :-1]).norm()) > largest:
            break
    return change
