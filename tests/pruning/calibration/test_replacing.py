"""Passes with other tensors instead of parameters: they are used everywhere, and every place is restored."""

import pytest
import torch
from torch import nn

from isoprune_hf.pruning.calibration.replacing import replaced_parameters


class TwoNames(nn.Module):
    """One layer has two names, and a second layer shares its weight."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.tied = nn.Linear(4, 4), nn.Linear(4, 4)
        self.again = self.first
        self.tied.weight = self.first.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.tied(self.again(self.first(x)))


@pytest.mark.parametrize("name", ["first.weight", "again.weight", "tied.weight"])
def test_tensor_is_used_under_every_name(name: str) -> None:
    model, x = TwoNames(), torch.randn(2, 4)
    weight, expected = model.first.weight, torch.zeros(2, 4) + model.tied.bias
    with replaced_parameters(model, {name: torch.zeros(4, 4)}):
        torch.testing.assert_close(model(x), expected)
    assert model.first.weight is weight and model.again.weight is weight and model.tied.weight is weight
    assert model.first is model.again


def test_recurrent_layer_uses_and_regains_its_weights() -> None:
    lstm, x = nn.LSTM(3, 3), torch.randn(5, 1, 3)
    before, held, weights = lstm(x)[0], lstm._flat_weights, list(lstm._flat_weights)
    leaf = lstm.weight_ih_l0.detach().clone().requires_grad_()
    with replaced_parameters(lstm, {"weight_ih_l0": leaf}):
        (gradient,) = torch.autograd.grad(lstm(x)[0].sum(), leaf)
    assert gradient.abs().sum() > 0
    assert lstm._flat_weights is held
    assert all(new is old for new, old in zip(lstm._flat_weights, weights, strict=True))
    torch.testing.assert_close(lstm(x)[0], before)


def test_parameters_are_restored_after_an_error() -> None:
    model = nn.Linear(2, 2)
    weight = model.weight
    with pytest.raises(ZeroDivisionError), replaced_parameters(model, {"weight": torch.zeros(2, 2)}):
        raise ZeroDivisionError
    assert model.weight is weight
