"""Cuts by torch-pruning: heads stay, sizes of attention follow, and BatchNorm is counted anew where there is one."""

import pytest
import torch
from peer_cuts import IMPORTANCES, cut, macs_of, peer_cuts
from torch import nn

pytestmark = pytest.mark.benchmarks


class Attention(nn.Module):
    """Attention of two heads of four dims, by the names of GLPN."""

    def __init__(self) -> None:
        super().__init__()
        self.attention_head_size, self.all_head_size = 4, 8
        self.query, self.key, self.value, self.out = (nn.Linear(8, 8) for _ in range(4))

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        shape = (*tokens.shape[:2], -1, self.attention_head_size)
        query, key, value = (layer(tokens).view(shape).transpose(1, 2) for layer in (self.query, self.key, self.value))
        mixed = (query @ key.transpose(2, 3)).softmax(3) @ value
        return self.out(mixed.transpose(1, 2).reshape(*tokens.shape[:2], self.all_head_size))


def total(network: nn.Module, images: torch.Tensor) -> torch.Tensor:
    return network(images).sum()


def test_heads_stay_and_their_sizes_follow() -> None:
    torch.manual_seed(0)
    network = Attention()
    for parameter in network.parameters():
        parameter.grad = torch.zeros_like(parameter)
    importance = IMPORTANCES["torch-pruning, isomorphic, l2"]
    pruned = cut(network, torch.randn(1, 5, 8), 0.5, importance, lambda name: name == "out", total)
    assert [pruned.query.out_features, pruned.key.out_features, pruned.value.out_features] == [4, 4, 4]
    assert (pruned.attention_head_size, pruned.all_head_size) == (2, 4) and pruned.out.out_features == 8
    assert network.attention_head_size == 4 and network.query.out_features == 8


def test_macs_are_those_of_the_call() -> None:
    network = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 2, 1))
    images = torch.randn(1, 3, 5, 5)
    assert macs_of(network, images, total) == 25 * (4 * 3 * 9 + 2 * 4)
    assert macs_of(network, images, lambda network, images: network[0](images).sum()) == 25 * 4 * 3 * 9


@pytest.mark.parametrize(("norm", "after"), [(nn.BatchNorm2d, ["", ", BatchNorm anew"]), (nn.InstanceNorm2d, [""])])
def test_batchnorm_anew_needs_batchnorm(norm: type[nn.Module], after: list[str]) -> None:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(3, 8, 3), norm(8), nn.ReLU(), nn.Conv2d(8, 2, 1)).eval()
    batches = [torch.randn(2, 3, 6, 6)]
    losses = [lambda network: network(batches[0]).square().mean()]
    found = list(peer_cuts(network, batches, losses, 0.5, is_kept=lambda name: name == "3", output=total))
    assert [name for name, _, _ in found] == [name + part for name in IMPORTANCES for part in after]
    assert all(left == 0.5 and pruned[0].out_channels == 4 for _, left, pruned in found)
