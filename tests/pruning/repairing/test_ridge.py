"""The form of a fit, and the ridge that cross-validation between the halves of a sample chooses."""

import functools
import math
from dataclasses import replace

import pytest
import torch
from torch import nn

from isoprune_hf.pruning.repairing.centred_equations import CentredEquations
from isoprune_hf.pruning.repairing.equations import Equations
from isoprune_hf.pruning.repairing.fitted_rows import FitSize, rows_of, size_of
from isoprune_hf.pruning.repairing.kernel_equations import KernelEquations
from isoprune_hf.pruning.repairing.normal_equations import NormalEquations
from isoprune_hf.pruning.repairing.ridge import (
    MAX_GROWTH,
    RIDGES,
    RidgeSearch,
    choose_ridge,
    form_of_fit,
    solve_within_bounds,
)

FORMS: tuple[type[Equations], ...] = (NormalEquations, KernelEquations)
LARGE = 2**40


def equations_of(form: type[Equations], layer: nn.Linear, x: torch.Tensor, missing: torch.Tensor) -> Equations:
    equations = form.empty(size_of(layer), torch.device("cpu"))
    equations.add(rows_of(layer, None, size_of(layer), x=x, output=missing, missing=missing, dim=1))
    return equations


@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.__name__)
def test_ridge_grows_with_the_noise(form: type[Equations]) -> None:
    generator = torch.Generator().manual_seed(0)
    layer = nn.Linear(40, 3, dtype=torch.float64)

    def noisy(count: int, slope: float, noise: float, shift: float = 2.0) -> Equations:
        x, error = (torch.randn(count, size, generator=generator, dtype=torch.float64) for size in (40, 3))
        return equations_of(form, layer, x, shift + slope * x[:, :3] + noise * error)

    def chosen(count: int, **values: float) -> float | None:
        return choose_ridge(noisy(count, **values), noisy(count, **values), has_shift=True)

    assert chosen(400, slope=1, noise=0) == min(RIDGES)
    assert min(RIDGES) < chosen(400, slope=1, noise=3) < math.inf
    assert chosen(60, slope=0, noise=1) == math.inf  # the bias alone
    assert chosen(60, slope=0, noise=1, shift=0) is None  # nothing
    empty = form.empty(size_of(layer), torch.device("cpu"))
    assert choose_ridge(noisy(60, 1, 1), empty, has_shift=True) in RIDGES


@pytest.mark.parametrize("noise", [0.0, 3.0, 30.0])
def test_ridge_does_not_depend_on_start(noise: float) -> None:
    generator = torch.Generator().manual_seed(0)
    layer = nn.Linear(40, 3, dtype=torch.float64)
    halves = []
    for _ in range(2):
        x, error = (torch.randn(200, size, generator=generator, dtype=torch.float64) for size in (40, 3))
        halves.append(equations_of(NormalEquations, layer, x, x[:, :3] + noise * error))
    wanted = choose_ridge(*halves, has_shift=True)
    assert {choose_ridge(*halves, has_shift=True, start=start) for start in RIDGES} == {wanted}


def test_search_leaves_ridges_that_cannot_be_solved(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = nn.Linear(40, 3, dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)
    halves = []
    for _ in range(2):
        x, error = (torch.randn(200, size, generator=generator, dtype=torch.float64) for size in (40, 3))
        halves.append(equations_of(NormalEquations, layer, x, x[:, :3] + error))
    solve = CentredEquations.solve

    def fail(self: CentredEquations, ridge: float, *, has_shift: bool) -> torch.Tensor:
        change = solve(self, ridge, has_shift=has_shift)
        return change if ridge >= 3 else torch.full_like(change, math.nan)

    monkeypatch.setattr(CentredEquations, "solve", fail)
    assert {choose_ridge(*halves, has_shift=True, start=start) for start in RIDGES} == {3.0}


def test_search_starts_from_last_of_its_kind(monkeypatch: pytest.MonkeyPatch) -> None:
    starts: list[float] = []
    ridges = iter((10.0, 0.01, None, 1.0, 1.0, 3.0))

    def choose(first: Equations, second: Equations, *, has_shift: bool, start: float) -> float | None:
        starts.append(start)
        return next(ridges)

    monkeypatch.setattr("isoprune_hf.pruning.repairing.ridge.choose_ridge", choose)
    search = RidgeSearch()
    equations = NormalEquations.empty(FitSize(1, 1, 1, torch.float32), torch.device("cpu"))
    for name in ("blocks.0.fc1", "blocks.0.fc2", "blocks.1.fc1", "blocks.1.fc2", "blocks.12.fc1", "blocks.12.fc2"):
        search.choose(name, equations, equations, has_shift=True)
    assert starts == [0.3, 0.3, 10.0, 0.01, math.inf, 1.0]


@pytest.mark.parametrize("noise", [0.0, 1.0, 4.0, 16.0])
@pytest.mark.parametrize("count", [12, 100])
def test_both_forms_choose_the_same_ridge(count: int, noise: float) -> None:
    layer = nn.Linear(40, 200, dtype=torch.float64)  # more outputs than are compared
    chosen = []
    for form in FORMS:
        generator = torch.Generator().manual_seed(count)
        halves = []
        for _ in range(2):
            x, error = (torch.randn(count, size, generator=generator, dtype=torch.float64) for size in (40, 200))
            halves.append(equations_of(form, layer, x, x.repeat(1, 5) + noise * error))
        chosen.append(choose_ridge(*halves, has_shift=True))
    assert chosen[0] == chosen[1]


@pytest.mark.parametrize("has_shift", [True, False], ids=["shift", "no shift"])
@pytest.mark.parametrize("noise", [0.0, 0.3, 3.0, 30.0])
@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.__name__)
def test_float32_chooses_the_ridge_of_float64(form: type[Equations], noise: float, has_shift: bool) -> None:
    """The features have means of 100 deviations, and variances along directions that differ 10**8 times."""
    generator = torch.Generator().manual_seed(0)
    normal = functools.partial(torch.randn, generator=generator, dtype=torch.float64)
    mixed = torch.linalg.qr(normal(60, 60))[0] * torch.logspace(0, -4, 60, dtype=torch.float64)[:, None]
    halves: list[Equations] = []
    narrow: list[Equations] = []
    for _ in range(2):
        x = normal(90, 60) @ mixed
        missing = x @ mixed.mT + noise * x.std() * normal(90, 60)
        x += 100 * x.std(0)
        half = equations_of(form, nn.Linear(60, 60, dtype=torch.float64), x, missing)
        halves.append(half)
        if isinstance(half, NormalEquations):
            narrow.append(replace(half, dtype=torch.float32))
        else:
            narrow.append(equations_of(form, nn.Linear(60, 60), x.float(), missing.float()))
    assert choose_ridge(*narrow, has_shift=has_shift) == choose_ridge(*halves, has_shift=has_shift)


def test_features_that_never_change_get_a_bias() -> None:
    # Products of 960 features that are almost constant, in float32, have no Cholesky factor.
    generator = torch.Generator().manual_seed(0)
    layer = nn.Linear(960, 7)
    level = 10 * torch.rand(960, generator=generator)

    def constant() -> Equations:
        x = level * (1 + 1e-6 * torch.randn(30, 960, generator=generator))
        return equations_of(NormalEquations, layer, x, torch.full((30, 7), 2.0))

    first = constant()
    assert not first.solve(0.1, has_shift=True).isfinite().all()
    assert choose_ridge(first, constant(), has_shift=True) == math.inf


def test_form_follows_from_rows_and_limit() -> None:
    size = FitSize(groups=1, features=1000, outputs=10, dtype=torch.float32)
    assert form_of_fit(size, 10_000, LARGE) is NormalEquations
    assert form_of_fit(size, 100, LARGE) is KernelEquations
    # 4 matrices of 1001 x 1001 in float64 have 32 MB, 2 of 600 x 600 and rows of 1001 features 13 MB.
    assert form_of_fit(size, 600, 45 * 10**6) is NormalEquations
    assert form_of_fit(size, 600, 30 * 10**6) is KernelEquations
    assert form_of_fit(size, 600, 14 * 10**6) is KernelEquations
    assert form_of_fit(size, 600, 13 * 10**6) is None
    assert form_of_fit(size, 10_000, 30 * 10**6) is None


def test_bias_alone_needs_few_bytes() -> None:
    layer = nn.Linear(25_088, 4096, device="meta")
    assert form_of_fit(size_of(layer), 10**6, 2**30) is None
    assert form_of_fit(size_of(layer, is_bias_only=True), 10**6, 2**20) is NormalEquations


@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.__name__)
@pytest.mark.parametrize("size", [0.1, 1.0])
def test_ridge_grows_until_weights_are_bounded(size: float, form: type[Equations]) -> None:
    """The outputs are the difference of two features, divided by its size: the smaller, the larger the weights."""
    generator = torch.Generator().manual_seed(0)
    layer = nn.Linear(2, 1, dtype=torch.float64)
    weights = torch.ones(1, 2, 1, dtype=torch.float64)
    common, difference = torch.randn(2, 50, 1, generator=generator, dtype=torch.float64)
    x = torch.cat([common, common + size * difference], 1)
    missing = difference - x.sum(1, keepdim=True)
    found = solve_within_bounds(equations_of(form, layer, x, missing), weights, RIDGES[0], has_shift=True)
    y, features = missing - missing.mean(), x - x.mean(0)
    products = features.T @ features
    for ridge in RIDGES[:-1]:
        expected = torch.linalg.solve(products + ridge * torch.diag(products.diag()), features.T @ y)
        if (weights[0] + expected).norm() <= MAX_GROWTH * 2**0.5:
            break
    assert (ridge == RIDGES[0]) == (size == 1)
    torch.testing.assert_close(found[0, :-1], expected, rtol=1e-3, atol=1e-6)
