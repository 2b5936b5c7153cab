"""A model that is stored in half precision is trained with weights in float32."""

from types import SimpleNamespace

import pytest
import torch
from helpers.training import TinyNet, make_recipe, train
from torch import nn

from isoprune_hf.training.stored_precision import StoredPrecision

HALF = [torch.bfloat16, torch.float16]


class CastingNet(TinyNet):
    """A network that casts images to the type of its weights, as the models of a folder do."""

    def forward(self, pixel_values: torch.Tensor) -> SimpleNamespace:
        return super().forward(pixel_values.to(self.head.weight.dtype))


def make(dtype: torch.dtype) -> CastingNet:
    torch.manual_seed(0)
    return CastingNet().to(dtype)


@pytest.mark.parametrize("dtype", HALF)
def test_weights_are_those_of_float32_training(dtype: torch.dtype) -> None:
    model, expected = make(dtype), make(dtype).float()
    before = model.stem.weight.clone()
    recipe = make_recipe(learning_rate=1e-3, epochs=3)
    train(model, recipe)
    train(expected, recipe)
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}
    assert all(
        torch.equal(tensor, expected.state_dict()[name].to(dtype)) for name, tensor in model.state_dict().items()
    )
    assert not torch.equal(model.stem.weight, before)


def test_checkpoints_and_figures_are_of_stored_weights() -> None:
    types, history = [], []

    def save(name: str, model: nn.Module, entry: dict[str, float]) -> None:
        types.append(next(model.parameters()).dtype)
        if name == "last":
            history.append(entry)

    model = make(torch.bfloat16)
    train(model, make_recipe(ema_decay=0.9), save=save)
    assert set(types) == {torch.bfloat16}
    assert len(history) == 2


def test_other_types_stay_as_they_are() -> None:
    model = nn.BatchNorm1d(3).to(torch.bfloat16)
    precision = StoredPrecision(model)
    assert (model.weight.dtype, model.running_var.dtype, model.num_batches_tracked.dtype) == (
        torch.float32,
        torch.float32,
        torch.int64,
    )
    assert precision.stored(model).weight.dtype == torch.bfloat16 and model.weight.dtype == torch.float32
    precision.restore(model)
    assert model.running_var.dtype == torch.bfloat16
    plain = nn.Linear(2, 2)
    assert StoredPrecision(plain).stored(plain) is plain
