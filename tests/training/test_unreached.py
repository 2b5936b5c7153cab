"""Networks with parameters that no loss reaches are trained on one and on several ranks."""

import functools
from pathlib import Path
from types import SimpleNamespace

import torch
from accelerate import Accelerator
from helpers.ranks import call_on_ranks
from helpers.training import TinyNet, make_processor, make_recipe, train
from torch import Tensor, nn

from isoprune_hf.training.unreached import frozen_unreached

UNREACHED = {"token", "auxiliary.weight", "auxiliary.bias"}


class Auxiliary(TinyNet):
    """A network with a parameter that nothing reads, an auxiliary head, and a part that training skips at random."""

    def __init__(self) -> None:
        super().__init__()
        self.token, self.auxiliary = nn.Parameter(torch.zeros(8)), nn.Linear(8, 3)
        self.skipped, self.seen = nn.Linear(8, 8), nn.BatchNorm1d(8)

    def forward(self, pixel_values: Tensor) -> SimpleNamespace:
        hidden = self.seen(self.norm(self.stem(pixel_values.flatten(1))))
        if not self.training or float(torch.rand(())) > 2:
            hidden = hidden + self.skipped(hidden)
        if self.training:
            self.last = self.auxiliary(hidden)
        return SimpleNamespace(logits=self.head(hidden.tanh()))


def make_auxiliary() -> Auxiliary:
    torch.manual_seed(0)
    return Auxiliary()


def test_only_parameters_without_gradient_are_frozen() -> None:
    net = make_auxiliary().eval()
    net.stem.bias.requires_grad_(False)
    before = {name: value.clone() for name, value in net.state_dict().items()}
    state = torch.get_rng_state()
    with frozen_unreached(net, make_processor()):
        frozen = {name for name, parameter in net.named_parameters() if not parameter.requires_grad}
        assert frozen == UNREACHED | {"stem.bias"}
        assert not net.training and not hasattr(net, "last")
        assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
        assert torch.equal(torch.get_rng_state(), state)
        assert all(parameter.grad is None for parameter in net.parameters())
    assert {name for name, parameter in net.named_parameters() if not parameter.requires_grad} == {"stem.bias"}


class Steady(Auxiliary):
    """The same without the part that training skips."""

    def __init__(self) -> None:
        super().__init__()
        del self.skipped

    def forward(self, pixel_values: Tensor) -> SimpleNamespace:
        hidden = self.seen(self.norm(self.stem(pixel_values.flatten(1))))
        if self.training:
            self.last = self.auxiliary(hidden)
        return SimpleNamespace(logits=self.head(hidden.tanh()))


def train_steady(accelerator: Accelerator | None, folder: Path) -> None:
    torch.manual_seed(0)
    net = Steady()
    options = {} if accelerator is None else {"accelerator": accelerator}
    train(net, make_recipe(virtual_replicas=2, weight_decay=0.1, distillation="none"), **options)
    if accelerator is None or accelerator.is_main_process:
        torch.save(net.state_dict(), folder / "weights.pt")


def test_two_ranks_train_the_weights_of_one(tmp_path: Path) -> None:
    (tmp_path / "one").mkdir()
    (tmp_path / "two").mkdir()
    train_steady(None, tmp_path / "one")
    call_on_ranks(functools.partial(train_steady, folder=tmp_path / "two"), tmp_path / "log")
    one, two = (torch.load(tmp_path / name / "weights.pt", weights_only=True) for name in ("one", "two"))
    torch.testing.assert_close(two, one)
    torch.manual_seed(0)
    drawn = Steady().state_dict()
    assert all(torch.equal(one[name], drawn[name]) for name in UNREACHED)
    assert not torch.equal(one["stem.weight"], drawn["stem.weight"])
