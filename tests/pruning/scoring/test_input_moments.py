"""Moments of the inputs of layers, compared with ridge regressions of numpy."""

import numpy as np
import torch

from isoprune_hf.pruning.scoring.input_moments import InputMoments


def moments_of(x: torch.Tensor, dim: int) -> InputMoments:
    moments = InputMoments.empty(x.shape[dim], x.device)
    for part in x.split(2):
        moments.add(part, dim, len(part))
    return moments


def test_prediction_is_that_of_numpy() -> None:
    x = torch.randn(4, 6, 8, generator=torch.Generator().manual_seed(0)) + 1
    rows = x.flatten(0, 1).double().numpy()
    centred = rows - rows.mean(0)
    kept, removed = [0, 2, 3, 6, 7], [1, 4, 5]
    read, wanted = centred[:, kept], centred[:, removed]
    variance, energy = read.var(0), (rows[:, kept] ** 2).mean(0)
    damping = len(rows) * ((1e-3 + len(kept) / len(rows)) * variance + 1e-6 * energy)
    weights = np.linalg.solve(read.T @ read + np.diag(damping), read.T @ wanted)
    found = moments_of(x, 2).predict(torch.tensor(kept), torch.tensor(removed))
    expected = rows.copy()
    expected[:, removed] = rows.mean(0)[removed] + read @ weights
    replaced = found.replace(x, 2).flatten(0, 1).double().numpy()
    np.testing.assert_allclose(replaced, expected, rtol=1e-5, atol=1e-5)


def test_channels_of_images_lie_on_any_dim() -> None:
    x = torch.randn(4, 5, 3, 3, generator=torch.Generator().manual_seed(1))
    kept, removed = torch.tensor([0, 1, 4]), torch.tensor([2, 3])
    first = moments_of(x, 1).predict(kept, removed).replace(x, 1)
    last = x.movedim(1, -1)
    torch.testing.assert_close(first.movedim(1, -1), moments_of(last, 3).predict(kept, removed).replace(last, 3))


def test_moments_are_precise_under_autocast() -> None:
    x = torch.randn(4, 6, 8, generator=torch.Generator().manual_seed(2))
    with torch.autocast("cpu", torch.bfloat16):
        found = moments_of(x, 2)
    assert torch.equal(found.products, moments_of(x, 2).products)


def test_copy_of_a_channel_is_predicted_by_it() -> None:
    x = torch.randn(200, 60, 5, generator=torch.Generator().manual_seed(2))
    x[..., 3] = 2 * x[..., 1] + 1
    found = moments_of(x, 2).predict(torch.tensor([0, 1, 2, 4]), torch.tensor([3])).replace(x, 2)
    torch.testing.assert_close(found, x, rtol=0, atol=0.02)


def test_constant_channels_are_replaced_by_themselves() -> None:
    x = torch.ones(4, 10, 3) * torch.tensor([1.0, 2.0, 0.0])
    prediction = moments_of(x, 2).predict(torch.tensor([0, 2]), torch.tensor([1]))
    torch.testing.assert_close(prediction.replace(x, 2), x)


def test_at_most_64_positions_of_an_image_count() -> None:
    assert moments_of(torch.randn(4, 2, 40, 40), 1).products[-1, -1] == 4 * 64
