"""Which elements of the outputs of layers are kept, against the cut network itself."""

import numpy as np
import pytest
import timm
import torch
from helpers.odd_networks import NETWORKS, WIDTH, BatchNormAttention, Mlp, TokenNet, open_odd
from torch import Tensor, nn

from isoprune_hf.checkpoint.modeling_isoprune import IsoPruneConfig, IsoPruneForImageClassification
from isoprune_hf.pruning.cutting.cut import apply_plan, keep_masks
from isoprune_hf.pruning.graph.find_groups import trace_groups
from isoprune_hf.pruning.graph.output_masks import output_masks
from isoprune_hf.pruning.plan import PruningPlan


class Gated(TokenNet):
    """Two groups of equal width, and linears over tokens on the rows of both: a gated MLP over tokens."""

    def build(self) -> None:
        self.one, self.two = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 2 * WIDTH)
        self.mix, self.gate, self.joined = nn.Linear(64, 48), nn.Linear(64, 64), nn.Linear(64, 64)
        self.down, self.back = nn.Linear(WIDTH, WIDTH), nn.Linear(48, 64)
        self.attention, self.mlp = BatchNormAttention(), Mlp()

    def body(self, x: Tensor) -> Tensor:
        first, second = self.two(x).chunk(2, -1)
        gated = first * self.gate(second.transpose(1, 2)).transpose(1, 2)
        both = self.joined(torch.cat([self.one(x), gated], -1).transpose(1, 2)).transpose(1, 2)
        x = x + self.back(self.mix(x.transpose(1, 2))).transpose(1, 2)
        return self.mlp(self.attention(x + self.down(sum(both.chunk(2, -1)))))


@timm.models.register_model
def isoprune_test_gated(num_classes: int = 5, **_: object) -> nn.Module:
    return Gated(num_classes)


def uneven_plan(groups: object) -> PruningPlan:
    """Keep half of each group; groups of one width keep different channels."""
    rng = np.random.default_rng(3)
    kept = {
        group.name: tuple(sorted(rng.choice(group.channels, group.channels // 2, replace=False).tolist()))
        for group in groups
        if not group.num_heads
    }
    return PruningPlan(kept, {})


def test_rows_of_groups_of_equal_width_differ() -> None:
    base = {"library": "timm", "architecture": "isoprune_test_gated", "args": {}}
    model = IsoPruneForImageClassification(IsoPruneConfig(base=base, num_labels=5, image_size=[3, 32, 32])).eval()
    groups = trace_groups(model)
    plan = uneven_plan(groups)
    masks = keep_masks(plan, groups, model.model)
    found = output_masks(groups.graph, masks)
    stream, one = masks["stem.weight", 0], masks["one.weight", 0]
    first, second = np.split(masks["two.weight", 0], 2)
    assert not np.array_equal(stream, first) and np.array_equal(first, second) and np.array_equal(first, one)
    assert [*found["mix"][0]] == [1, 2] and np.array_equal(found["mix"][0][1], stream)
    assert np.array_equal(found["mix"][0][2], masks["mix.weight", 0])
    assert np.array_equal(found["gate"][0][1], second)
    assert np.array_equal(found["joined"][0][1], np.concatenate([one, first]))
    assert [*found["down"][0]] == [2] and np.array_equal(found["down"][0][2], stream)


@pytest.mark.parametrize("name", [name for name, network in NETWORKS.items() if network.in_channels == 3])
def test_masks_have_the_sizes_of_the_cut(name: str) -> None:
    model = open_odd(name).model
    groups = trace_groups(model)
    plan = uneven_plan(groups)
    pruned = apply_plan(model, plan, groups)
    found = output_masks(groups.graph, keep_masks(plan, groups, model.model))
    shapes: tuple[dict[str, list[torch.Size]], ...] = ({}, {})
    for network, seen in zip((model, pruned), shapes, strict=True):
        for path, module in network.model.named_modules():
            if not list(module.children()):
                module.register_forward_hook(
                    lambda _, args, output, path=path, seen=seen: seen.setdefault(path, []).append(output)
                )
        with torch.no_grad():
            network(torch.zeros(1, *model.config.image_size))
    assert shapes[0].keys() == shapes[1].keys()
    for path in shapes[0].keys() & found.keys():
        for before, after, masks in zip(shapes[0][path], shapes[1][path], found[path], strict=True):
            if isinstance(before, Tensor):
                sizes = [int(masks[dim].sum()) if dim in masks else size for dim, size in enumerate(before.shape)]
                assert sizes == list(after.shape)
