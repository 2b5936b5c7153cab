"""The loss of features: its squared gradient is, on average, the sum of the squared gradients of all features."""

import copy
import itertools

import torch

from isoprune_hf.models.feature_loss import FEATURES, draw_signs


def test_mean_square_over_signs_is_exact() -> None:
    features = torch.tensor([[[1.0, 2.0], [3.0, -1.0]]])  # one image, two tokens, two channels
    gate = torch.ones((), requires_grad=True)
    slopes = torch.tensor([[[0.5, -1.0], [2.0, 3.0]]])  # of each feature by the gate
    squares = []
    for signs in itertools.product((-1, 1), repeat=4):
        outputs = [features + slopes * (gate - 1)]
        loss = FEATURES.summed_loss(outputs, torch.tensor([signs], dtype=torch.int8), features)
        (gradient,) = torch.autograd.grad(loss, gate)
        squares.append(gradient**2)
    wanted = (0.25 + 1 + 4 + 9) / (1 + 4 + 9 + 1)  # sum of squared slopes over the squared norm of the features
    torch.testing.assert_close(torch.stack(squares).mean(), torch.tensor(wanted))


def test_every_output_has_its_own_signs() -> None:
    first, second = torch.tensor([[3.0, 4.0]]), torch.tensor([[2.0]])
    signs = torch.tensor([[1, -1, -1]], dtype=torch.int8)
    loss = FEATURES.summed_loss([first, second], signs, first)
    torch.testing.assert_close(loss, torch.tensor((3.0 - 4.0) / 5 - 1.0))


def test_signs_depend_on_the_pixels_alone() -> None:
    images = torch.randn(5, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    shapes = [torch.Size((6, 8)), torch.Size((8,))]
    signs = draw_signs(images, shapes)
    assert signs.shape == (5, 22) and set(signs.unique().tolist()) == {-1, 1}
    assert torch.equal(draw_signs(images[2:4], shapes), signs[2:4])
    assert len({tuple(row) for row in signs.tolist()}) == 5


def test_networks_are_compared_at_few_positions() -> None:
    tokens, maps = torch.arange(2 * 20 * 3.0).reshape(2, 20, 3), torch.arange(2 * 3 * 16.0).reshape(2, 3, 4, 4)
    compared = FEATURES.logits([tokens, maps, torch.ones(2, 3)])
    kept = [tokens[:, ::3].reshape(2, -1), maps.flatten(2)[:, :, ::2].reshape(2, -1), torch.ones(2, 3)]
    assert torch.equal(compared, torch.cat(kept, 1))
    assert copy.deepcopy(FEATURES) is FEATURES
