"""BatchNorm folded into convolutions: answers stay, modules leave, and unsafe pairs are left."""

import pytest
import torch
from torch import nn

from isoprune_hf.measuring.folding import fold_batchnorm


def with_statistics(model: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2.0)
            nn.init.normal_(module.weight)
            nn.init.normal_(module.bias)
    return model.eval()


class NormWithActivation(nn.BatchNorm2d):
    """As timm's: the activation is a module inside the norm."""

    def __init__(self, width: int) -> None:
        super().__init__(width)
        self.act = nn.ReLU()

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        return self.act(super().forward(features))


class Net(nn.Module):
    """A convolution without bias, one with; the second output is used twice if asked for."""

    def __init__(self, *, is_used_twice: bool = False) -> None:
        super().__init__()
        self.first, self.norm = nn.Conv2d(3, 4, 3, bias=False), NormWithActivation(4)
        self.second, self.last = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)
        self.is_used_twice = is_used_twice

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        features = self.second(self.norm(self.first(pixels)))
        return self.last(features) + (features if self.is_used_twice else 0)


PIXELS = torch.randn(2, 3, 6, 6, generator=torch.Generator().manual_seed(1))


def norms(model: nn.Module) -> int:
    return sum(isinstance(module, nn.BatchNorm2d) for module in model.modules())


def test_folded_copy_answers_alike_without_norms() -> None:
    model = with_statistics(Net())
    folded, note = fold_batchnorm(model, PIXELS)
    assert note is None
    assert (norms(folded), norms(model)) == (0, 2)
    with torch.no_grad():
        torch.testing.assert_close(folded(PIXELS), model(PIXELS), rtol=1e-4, atol=1e-4)


def test_output_with_another_use_is_not_folded() -> None:
    model = with_statistics(Net(is_used_twice=True))
    folded, note = fold_batchnorm(model, PIXELS)
    assert norms(folded) == 2 and note is not None and "not folded" in note
    with torch.no_grad():
        assert torch.equal(folded(PIXELS), model(PIXELS))


@pytest.mark.parametrize("calls", [1, 2])
def test_convolution_that_runs_twice_is_left(calls: int) -> None:
    conv = nn.Conv2d(3, 3, 1)
    model = with_statistics(nn.Sequential(*[conv] * calls, nn.BatchNorm2d(3)))
    folded, note = fold_batchnorm(model, PIXELS)
    assert (norms(folded), note) == (calls - 1, None)
