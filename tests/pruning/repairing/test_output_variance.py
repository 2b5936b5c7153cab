"""Fitted outputs have the mean and, within limits, the variance of the dense outputs."""

import numpy as np
import pytest
import torch

from isoprune_hf.pruning.repairing.equations import Equations
from isoprune_hf.pruning.repairing.fitted_rows import FitSize, Rows
from isoprune_hf.pruning.repairing.kernel_equations import KernelEquations
from isoprune_hf.pruning.repairing.normal_equations import NormalEquations
from isoprune_hf.pruning.repairing.output_variance import DenseMoments, match_variance

CPU = torch.device("cpu")
SIZE = FitSize(groups=2, features=4, outputs=3, dtype=torch.float64)


def rows_with_noise(weights: torch.Tensor, noise: float) -> Rows:
    """Return 50 rows of a layer without a bias; the dense outputs follow other weights, a shift and noise."""
    generator = torch.Generator().manual_seed(0)
    x = 1 + torch.randn(2, 50, 4, generator=generator, dtype=torch.float64)
    other, error = (torch.randn(2, count, 3, generator=generator, dtype=torch.float64) for count in (4, 50))
    output = x @ weights
    dense = 3 + x @ other + noise * error
    return Rows(torch.cat([x, torch.ones_like(x[..., :1])], -1), output, dense - output)


def matched(form: type[Equations], weights: torch.Tensor, rows: Rows, ridge: float = 1.0) -> torch.Tensor:
    equations, moments = form.empty(SIZE, CPU), DenseMoments.empty(SIZE, CPU)
    for piece in zip(*(values.split(20, 1) for values in rows), strict=True):
        equations.add(Rows(*piece))
        moments.add(Rows(*piece))
    change = equations.solve(ridge, has_shift=True)
    match_variance(change, weights, equations, moments)
    return change


@pytest.mark.parametrize("form", [NormalEquations, KernelEquations], ids=lambda form: form.__name__)
def test_outputs_get_mean_and_variance_of_dense(form: type[Equations]) -> None:
    weights = torch.ones(2, 4, 3, dtype=torch.float64)
    rows = rows_with_noise(weights, 0.5)
    found = (rows.output + rows.features @ matched(form, weights, rows, 0.1)).numpy()
    dense = (rows.output + rows.missing).numpy()
    np.testing.assert_allclose(found.mean(1), dense.mean(1), rtol=1e-9)
    np.testing.assert_allclose(found.var(1), dense.var(1), rtol=1e-9)


@pytest.mark.parametrize("form", [NormalEquations, KernelEquations], ids=lambda form: form.__name__)
def test_noise_at_most_doubles_the_outputs(form: type[Equations]) -> None:
    weights = torch.ones(2, 4, 3, dtype=torch.float64)
    rows = rows_with_noise(weights, 1e3)
    equations = form.empty(SIZE, CPU)
    equations.add(rows)
    plain = equations.solve(1.0, has_shift=True)
    change = matched(form, weights, rows)
    torch.testing.assert_close(weights + change[:, :-1], 2 * (weights + plain[:, :-1]))


@pytest.mark.parametrize("form", [NormalEquations, KernelEquations], ids=lambda form: form.__name__)
def test_outputs_that_never_change_stay_constant(form: type[Equations]) -> None:
    weights = torch.zeros(2, 4, 3, dtype=torch.float64)
    rows = rows_with_noise(weights, 0.5)
    rows = rows._replace(missing=torch.full_like(rows.missing, 7.0))
    change = matched(form, weights, rows)
    torch.testing.assert_close(rows.features @ change, rows.missing, rtol=0, atol=1e-6)
