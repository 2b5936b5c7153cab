"""Both forms of a least-squares fit, compared with each other and with `numpy.linalg.lstsq`."""

import functools
import itertools
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from helpers.ranks import call_on_ranks
from torch import nn
from torch.profiler import ProfilerActivity, profile

from isoprune_hf.pruning.repairing.equations import Equations
from isoprune_hf.pruning.repairing.fitted_rows import FitSize, Rows, rows_of, size_of
from isoprune_hf.pruning.repairing.kernel_equations import KernelEquations
from isoprune_hf.pruning.repairing.normal_equations import NormalEquations
from isoprune_hf.pruning.repairing.ridge import RIDGES, choose_ridge

CPU = torch.device("cpu")
FORMS: tuple[type[Equations], ...] = (NormalEquations, KernelEquations)
of_each_form = pytest.mark.parametrize("form", FORMS, ids=lambda form: form.__name__)


def random_rows(size: FitSize, count: int, seed: int = 0) -> Rows:
    """Return rows whose missing outputs follow from the features, a shift and noise."""
    generator = torch.Generator().manual_seed(seed)
    normal = functools.partial(torch.randn, generator=generator, dtype=size.dtype)
    x = 1 + normal(size.groups, count, size.features)
    output, noise = (normal(size.groups, count, size.outputs) for _ in range(2))
    missing = 2 + x[..., :1] - x[..., 1:2] + noise
    return Rows(torch.cat([x, torch.ones_like(x[..., :1])], -1), output, missing)


def equations_of(form: type[Equations], size: FitSize, *pieces: Rows) -> Equations:
    equations = form.empty(size, CPU)
    for rows in pieces:
        equations.add(rows)
    return equations


def damped_by_lstsq(x: np.ndarray, y: np.ndarray, ridge: float, *, has_shift: bool) -> np.ndarray:
    """Return the change of one group: the damping of each feature is one more row whose missing outputs are 0."""
    mean, shift = (values.mean(0) if has_shift else 0 * values[0] for values in (x, y))
    damping = ridge * ((x - mean) ** 2).sum(0) + 1e-6 * (x**2).sum(0) + 1e-8 * len(x)
    rows = np.concatenate([x - mean, np.diag(np.sqrt(damping))])
    slopes, *_ = np.linalg.lstsq(rows, np.concatenate([y - shift, np.zeros((x.shape[1], y.shape[1]))]), rcond=None)
    return np.concatenate([slopes, [shift - mean @ slopes]])


@pytest.mark.parametrize("count", [9, 60], ids=["few rows", "many rows"])
@pytest.mark.parametrize("has_shift", [True, False], ids=["shift", "no shift"])
@of_each_form
def test_solution_is_that_of_damped_rows(form: type[Equations], has_shift: bool, count: int) -> None:
    size = FitSize(groups=2, features=20, outputs=3, dtype=torch.float64)
    rows = random_rows(size, count)
    equations = equations_of(form, size, rows)
    compared = equations.with_some_outputs(size.outputs)
    for ridge in RIDGES[:-1]:
        change = equations.solve(ridge, has_shift=has_shift)
        removed = 0.0
        for group, found in enumerate(change):
            x, y = rows.features[group].numpy(), rows.missing[group].numpy()
            expected = damped_by_lstsq(x[:, :-1], y, ridge, has_shift=has_shift)
            np.testing.assert_allclose(found, expected, rtol=1e-7, atol=1e-9)
            removed += (y**2).sum() - ((y - x @ expected) ** 2).sum()
        assert compared.gain(change) == pytest.approx(removed)
        torch.testing.assert_close(compared.solve(ridge, has_shift=has_shift), change)
    shift = equations.solve(RIDGES[-1], has_shift=has_shift)
    torch.testing.assert_close(shift, rows.missing.mean(1, keepdim=True) * has_shift)
    torch.testing.assert_close(compared.solve(RIDGES[-1], has_shift=has_shift), shift)
    assert compared.gain(shift) == pytest.approx(float(count * shift.square().sum()))


@of_each_form
def test_rows_may_come_in_pieces(form: type[Equations]) -> None:
    size = FitSize(groups=2, features=6, outputs=5, dtype=torch.float64)
    rows = random_rows(size, 12)
    whole = equations_of(form, size, rows)
    first, second, third = (Rows(*parts) for parts in zip(*(values.split(4, 1) for values in rows), strict=True))
    joined = equations_of(form, size, first, second)
    joined.absorb(equations_of(form, size, third))
    torch.testing.assert_close(joined.solve(0.1, has_shift=True), whole.solve(0.1, has_shift=True))
    torch.testing.assert_close(joined.totals, whole.totals)
    squares = [float(values.square().sum()) for values in (rows.output, rows.missing)]
    assert whole.totals.tolist() == pytest.approx([*squares, 12])
    # Two of five outputs are more than one third of them, and fewer than three.
    some = whole.with_some_outputs(2).solve(0.1, has_shift=True)
    torch.testing.assert_close(some, whole.solve(0.1, has_shift=True)[..., ::3])


@of_each_form
def test_numbers_that_are_not_finite_are_seen(form: type[Equations]) -> None:
    size = FitSize(groups=1, features=4, outputs=2, dtype=torch.float32)
    rows = random_rows(size, 5)
    assert equations_of(form, size, rows).is_finite()
    for name, value in itertools.product(("features", "missing", "output"), (float("nan"), float("inf"))):
        damaged = Rows(*(values.clone() for values in rows))
        getattr(damaged, name)[0, 1, 0] = value
        assert not equations_of(form, size, damaged).is_finite()


@of_each_form
def test_layer_without_a_bias_is_fitted_without(form: type[Equations]) -> None:
    generator = torch.Generator().manual_seed(0)
    layer = nn.Linear(4, 2, bias=False, dtype=torch.float64)
    x = 3 + torch.randn(50, 4, generator=generator, dtype=torch.float64)
    missing = 5 + x[:, :2]
    rows = rows_of(layer, None, size_of(layer), x=x, output=missing, missing=missing, dim=1)
    change = equations_of(form, size_of(layer), rows).solve(1e-12, has_shift=False)
    expected, *_ = np.linalg.lstsq(x.numpy(), missing.numpy(), rcond=None)
    np.testing.assert_allclose(change[0, :-1].numpy(), expected, rtol=1e-4)
    assert not change[0, -1].any()


def peak_of(work: Callable[[], object], trace: Path) -> int:
    """Return the largest number of bytes that tensors had at one time while `work` ran, those of before left out."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        work()
    recorded.export_chrome_trace(str(trace))
    events = [event for event in json.loads(trace.read_bytes())["traceEvents"] if event["name"] == "[memory]"]
    changes = [event["args"]["Bytes"] for event in sorted(events, key=lambda event: event["ts"])]
    return max(itertools.accumulate(changes))


SIZES = {
    "products of features": (NormalEquations, FitSize(1, 1200, 8, torch.float32), 64),
    "products in float64": (NormalEquations, FitSize(1, 1200, 8, torch.float64), 64),
    "products with outputs": (NormalEquations, FitSize(1, 500, 9000, torch.float32), 64),
    "kernel": (KernelEquations, FitSize(1, 200, 8, torch.float32), 2200),
    "features": (KernelEquations, FitSize(1, 30_000, 8, torch.float32), 100),
    "features in float64": (KernelEquations, FitSize(1, 30_000, 8, torch.float64), 100),
    "weights": (KernelEquations, FitSize(1, 9_000, 500, torch.float32), 64),
}


@pytest.mark.parametrize("case", SIZES)
def test_bytes_are_a_close_bound_of_the_peak(case: str, tmp_path: Path) -> None:
    form, size, count = SIZES[case]
    generator = torch.Generator().manual_seed(0)
    widths = (size.features + 1, size.outputs, size.outputs)

    def fit() -> None:
        halves = [form.empty(size, CPU) for _ in range(2)]
        for half in halves:
            parts = (torch.randn(1, count // 2, width, generator=generator, dtype=size.dtype) for width in widths)
            half.add(Rows(*parts))
        choose_ridge(*halves, has_shift=True)
        halves[0].absorb(halves[1])
        halves[0].solve(0.1, has_shift=True)

    share = peak_of(fit, tmp_path / "trace.json") / form.bytes_of(size, count)
    assert 0.65 < share < 1.01


def save_solution(accelerator: Accelerator, folder: Path, form: type[Equations]) -> None:
    """Solve for the rows of two ranks: 3 and 7, and for others of which rank 1 has none."""
    size = FitSize(groups=2, features=8, outputs=3, dtype=torch.float64)
    rank = accelerator.process_index
    both = equations_of(form, size, random_rows(size, (3, 7)[rank], seed=rank))
    one = equations_of(form, size, *[random_rows(size, 5, seed=2)][rank:])
    for equations in (both, one):
        equations.add_ranks(accelerator)
    both.absorb(one)
    torch.save((both.solve(0.1, has_shift=True), both.totals), folder / f"{rank}.pt")


@of_each_form
def test_two_ranks_solve_as_one_does(form: type[Equations], tmp_path: Path) -> None:
    call_on_ranks(functools.partial(save_solution, folder=tmp_path, form=form), tmp_path / "log")
    size = FitSize(groups=2, features=8, outputs=3, dtype=torch.float64)
    alone = equations_of(form, size, *(random_rows(size, count, seed) for seed, count in enumerate((3, 7, 5))))
    alone.add_ranks(None)
    for rank in range(2):
        change, totals = torch.load(tmp_path / f"{rank}.pt")
        torch.testing.assert_close(change, alone.solve(0.1, has_shift=True))
        torch.testing.assert_close(totals, alone.totals)
