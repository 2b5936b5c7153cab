"""Rows that wait for others before they are added to the equations of a fit."""

import pytest
import torch

from isoprune_hf.pruning.repairing.fitted_rows import FitSize, Rows, WaitingRows
from isoprune_hf.pruning.repairing.kernel_equations import KernelEquations
from isoprune_hf.pruning.repairing.normal_equations import NormalEquations


def rows_of_counts(counts: list[int], size: FitSize) -> list[Rows]:
    generator = torch.Generator().manual_seed(0)
    widths = (size.features + 1, size.outputs, size.outputs)
    return [
        Rows(*(torch.randn(size.groups, count, width, generator=generator) for width in widths)) for count in counts
    ]


def test_rows_wait_until_they_equal_features() -> None:
    size = FitSize(groups=2, features=5, outputs=3, dtype=torch.float32)
    pieces = rows_of_counts([2, 2, 1, 7, 3, 1], size)
    first: list[Rows] = []
    second: list[Rows] = []
    waiting = WaitingRows(size, first.append, second.append)
    for piece in pieces:
        waiting.add(piece)
    assert [rows.features.shape[1] for rows in first] == [5, 7]
    waiting.flush()
    waiting.flush()
    assert [rows.features.shape[1] for rows in first] == [5, 7, 4]
    for found, given in zip(zip(*first, strict=True), zip(*pieces, strict=True), strict=True):
        assert torch.equal(torch.cat(found, 1), torch.cat(given, 1).double())
    assert all(one is other for one, other in zip(first, second, strict=True))
    assert first[1].features is pieces[3].features  # not copied


@pytest.mark.parametrize("form", [NormalEquations, KernelEquations])
def test_sums_are_those_of_any_ranks(form: type[NormalEquations] | type[KernelEquations]) -> None:
    # One rank joins the first three pieces; of two ranks, each has some of them. The fourth is large enough alone.
    size = FitSize(groups=1, features=32, outputs=3, dtype=torch.float32)
    pieces = rows_of_counts([17, 17, 9, 40], size)
    alone = form.empty(size, torch.device("cpu"))
    one = WaitingRows(size, alone.add)
    for piece in pieces:
        one.add(piece)
    one.flush()
    ranks = [form.empty(size, torch.device("cpu")) for _ in range(2)]
    for rank, equations in enumerate(ranks):
        own = WaitingRows(size, equations.add)
        for piece in pieces[rank::2]:
            own.add(piece)
        own.flush()
    ranks[0].absorb(ranks[1])
    found, expected = (equations.solve(0.003, has_shift=True) for equations in (ranks[0], alone))
    # Products in float32 would differ by 1e-7, and the solution by more.
    assert (found - expected).norm() < 1e-12 * expected.norm()
