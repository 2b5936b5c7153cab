"""Rows that wait for others before they are added to the equations of a fit."""

import torch

from isoprune_hf.pruning.repairing.fitted_rows import FitSize, Rows, WaitingRows


def test_rows_wait_until_they_equal_features() -> None:
    size = FitSize(groups=2, features=5, outputs=3, dtype=torch.float32)
    generator = torch.Generator().manual_seed(0)
    counts = [2, 2, 1, 7, 3, 1]
    pieces = [Rows(*(torch.randn(2, count, width, generator=generator) for width in (6, 3, 3))) for count in counts]
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
        assert torch.equal(torch.cat(found, 1), torch.cat(given, 1))
    assert all(one is other for one, other in zip(first, second, strict=True))
    assert first[1].features is pieces[3].features  # not copied
