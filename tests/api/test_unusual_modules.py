"""Modules that users write in other ways than the libraries are pruned, and scored as their plain twins are."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torch.utils.checkpoint import checkpoint

from isoprune_hf import IsoPruneForImageClassification, Pruned, prune
from isoprune_hf.errors import RecipeError, UnsupportedArchitectureError

WIDTH = 16
MLP_CHANNELS = "mlp.0"


class Tokens(nn.Module):
    """A convolution that makes tokens, and an MLP beside them that is called in some way."""

    def __init__(self, call: Callable[[nn.Module, Tensor], Tensor] | None = None):
        super().__init__()
        self.stem = nn.Conv2d(3, WIDTH, 4, 4)
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 32), nn.GELU(), nn.Linear(32, WIDTH))
        self.head = nn.Linear(WIDTH, 4)
        self.call = call

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).flatten(2).transpose(1, 2)
        x = x + (self.mlp(x) if self.call is None else self.call(self.mlp, x))
        return self.head(x.mean(1))


class Rows(nn.Module):
    """Feature maps that are viewed as rows, which needs them in the layout of their dims."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.conv = nn.Conv2d(8, 8, 3, padding=1, stride=2)
        self.hidden = nn.Linear(8 * 16, 16)
        self.head = nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(self.stem(x).relu()).relu()
        return self.head(self.hidden(x.view(-1, x.shape[1] * 16)).relu())


class Normed(nn.Module):
    """A first layer whose weight torch computes from others, and two plain ones."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = parametrizations.weight_norm(nn.Conv2d(3, 8, 3, padding=1))
        self.conv = nn.Conv2d(8, 16, 3, padding=1)
        self.head = nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.conv(self.stem(x).relu()).relu().mean((2, 3)))


class Waves(nn.Module):
    """A complex parameter, the first of all, beside real ones."""

    def __init__(self) -> None:
        super().__init__()
        self.filter = nn.Parameter(torch.randn(WIDTH, 4, dtype=torch.complex64))
        self.stem = nn.Conv2d(3, WIDTH, 4, 4)
        self.grow, self.head = nn.Linear(WIDTH, 256), nn.Linear(256, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).flatten(2)
        x = x + torch.fft.ifft(torch.fft.fft(x, dim=2) * self.filter, dim=2).real
        return self.head(self.grow(x.mean(2)).relu())


def without_gradients(layer: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        return layer(x)


def make_batches() -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [
        (torch.randn(16, 3, 8, 8, generator=generator), torch.randint(4, (16,), generator=generator)) for _ in range(2)
    ]


def pruned(make: Callable[[], nn.Module], **settings: Any) -> Pruned:
    torch.manual_seed(0)
    return prune(make(), make_batches(), target_macs="50%", round_to=1, **settings)


@pytest.mark.parametrize("make", [Tokens, Rows, Normed, Waves])
def test_unusual_module_is_pruned_and_opened(make: type[nn.Module], tmp_path: Path) -> None:
    result = pruned(make)
    assert 0.4 < result.pruned_cost.macs / result.base_cost.macs <= 0.5
    result.save(tmp_path / "pruned", builder=make)
    again = IsoPruneForImageClassification.from_pretrained(tmp_path / "pruned", builder=make)
    images = make_batches()[0][0]
    assert torch.equal(again.model(images), result.model(images))


@pytest.mark.parametrize("criterion", ["trial_loss", "gate_fisher", "taylor", "hessian"])
def test_activation_checkpointing_leaves_the_scores(criterion: Any) -> None:
    plain = pruned(Tokens, criterion=criterion).scores.scores
    saving = partial(Tokens, lambda layer, x: checkpoint(layer, x, use_reentrant=False))
    found = pruned(saving, criterion=criterion).scores.scores
    torch.testing.assert_close(found, plain)


@pytest.mark.parametrize("call", [partial(checkpoint, use_reentrant=True), without_gradients])
def test_channels_without_gradients_are_ranked(call: Callable[[nn.Module, Tensor], Tensor]) -> None:
    scores = pruned(lambda: Tokens(call)).scores.scores[MLP_CHANNELS]
    assert (scores > 0).all() and len(scores.unique()) == 32


def test_channels_without_gradients_count_without_classes() -> None:
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(2)
    batches = [(images, torch.randn(len(images), 4, generator=generator)) for images, _ in make_batches()]
    scores = prune(Tokens(without_gradients), batches, target_macs="50%", round_to=1).scores.scores
    # Their loss is the mean of those of the other groups: here there is one.
    assert (scores[MLP_CHANNELS] > 0).all() and len(scores[MLP_CHANNELS].unique()) == 32
    others = [values.sum() for name, values in scores.items() if name != MLP_CHANNELS]
    torch.testing.assert_close(scores[MLP_CHANNELS].sum(), sum(others) / len(others))


def test_saturated_classifier_is_ranked_by_trial_cuts() -> None:
    def make() -> nn.Module:
        net = Tokens()
        with torch.no_grad():
            net.head.weight.mul_(1e6)
        return net

    torch.manual_seed(0)
    images = [batch for batch, _ in make_batches()]  # labelled by the classes of the module, so no gradient is left
    result = prune(make(), images, target_macs="50%", round_to=1)
    assert all((scores > 0).all() for scores in result.scores.scores.values())


def test_gradients_that_checkpointing_prevents_are_refused() -> None:
    with pytest.raises(RecipeError, match="use_reentrant"):
        pruned(partial(Tokens, partial(checkpoint, use_reentrant=True)), criterion="taylor")


def test_part_of_torchscript_is_refused_by_name() -> None:
    net = Tokens()
    net.mlp = torch.jit.script(net.mlp)
    with pytest.raises(UnsupportedArchitectureError, match=r"^mlp: a module of TorchScript"):
        prune(net, make_batches())


def test_fixed_half_precision_is_refused_with_advice() -> None:
    class Fixed(Tokens):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x.to(torch.bfloat16))

    with pytest.raises(UnsupportedArchitectureError, match=r"^Fixed does not run in float32.*weight\.dtype"):
        prune(Fixed().to(torch.bfloat16), make_batches())


@pytest.mark.parametrize("setting", ["criterion", "allocation", "reconstruct", "head_dims"])
def test_unknown_choice_is_refused_with_all(setting: str) -> None:
    with pytest.raises(RecipeError, match=rf"^prune\.{setting} must be one of \w+, .*, got 'nonsense'"):
        prune(Tokens(), make_batches(), **{setting: "nonsense"})
