from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import timm
import torch
from helpers.oracles import make_images, mask_error, permutation_error, randomize
from torch import Tensor, nn

from isoprune_hf.checkpoint.modeling_isoprune import IsoPruneConfig, IsoPruneForImageClassification
from isoprune_hf.errors import CheckpointError, UnsupportedArchitectureError
from isoprune_hf.pruning.cutting.cut import apply_plan
from isoprune_hf.pruning.deciding.make_plan import make_plan
from isoprune_hf.pruning.graph.axis import frozen_axis
from isoprune_hf.pruning.graph.find_groups import TracedGroups, trace_groups
from isoprune_hf.pruning.graph.verify import check_cut, sizes_after
from isoprune_hf.pruning.plan import PruningPlan
from isoprune_hf.pruning.scoring.score_groups import score_groups
from isoprune_hf.recipes import PruneRecipe


class Numbers(nn.Module):
    """A layer with its width as an attribute, in a tuple and in a list, and with a scale computed from its dims."""

    def __init__(self, kind: str, num_classes: int):
        super().__init__()
        self.kind, self.num_classes = kind, num_classes
        self.stem, self.mid, self.head = nn.Conv2d(3, 8, 4, 4), nn.Linear(8, 16), nn.Linear(16, num_classes)
        self.key = nn.Linear(8, 16)
        self.width, self.shape, self.sizes, self.scale = 16, (-1, 4, 16), [16, 16], 16**-0.5

    def forward(self, images: Tensor) -> Tensor:
        tokens = self.stem(images).flatten(2).transpose(1, 2)
        mid, key = self.mid(tokens), self.key(tokens)
        if self.kind == "number":
            mid = mid.reshape(-1, self.width).unflatten(0, (-1, 4))
        elif self.kind == "tuple":
            mid = mid.reshape(self.shape)
        elif self.kind == "list":
            mid, key = torch.cat([mid, key], -1).split(self.sizes, -1)
        elif self.kind == "scale":
            mid = (mid @ key.transpose(1, 2) * self.scale).softmax(-1) @ key
        elif self.kind == "flow" and len(range(mid.shape[-1])) < 12:  # a comparison that no traced integer records
            mid = mid.relu()
        elif self.kind == "two outputs":
            mid = mid + mid.max(1).values[:, None]
        return self.head((mid + key).mean(1))


@timm.models.register_model
def isoprune_test_numbers(num_classes: int = 1000, kind: str = "", **_: object) -> nn.Module:
    return Numbers(kind, num_classes)


def open_network(kind: str) -> IsoPruneForImageClassification:
    base = {"library": "timm", "architecture": "isoprune_test_numbers", "args": {"kind": kind}}
    model = IsoPruneForImageClassification(IsoPruneConfig(base=base, num_labels=5, image_size=[3, 8, 8])).eval()
    randomize(model)
    return model


def decide(model: IsoPruneForImageClassification, groups: TracedGroups) -> PruningPlan:
    recipe = PruneRecipe(criterion="l1", ratio=0.5, scope="local", round_to=1)
    return make_plan(groups, score_groups(model, groups, criterion="l1"), recipe)


KINDS: dict[str, dict[str, Any]] = {
    "number": {"width": 8},
    "tuple": {"shape": (-1, 4, 8)},
    "list": {"sizes": [8, 8]},
    "scale": {"scale": 8**-0.5},
}


@pytest.mark.parametrize("kind", KINDS)
def test_integer_attributes_follow_the_cut(kind: str) -> None:
    model = open_network(kind)
    groups, images = trace_groups(model), make_images(model)
    assert permutation_error(model, groups, images) <= 1e-9
    plan = decide(model, groups)
    pruned = apply_plan(model, plan, groups)
    assert mask_error(model, pruned, groups, plan, images) <= 1e-9
    assert pruned.model.mid.out_features == pruned.model.head.in_features == 8
    for name, value in KINDS[kind].items():
        assert getattr(pruned.model, name) == value and type(getattr(pruned.model, name)) is type(value)
        assert getattr(model.model, name) != value


def test_network_that_runs_differently_is_rejected() -> None:
    model = open_network("flow")
    groups, before = trace_groups(model), {name: t.clone() for name, t in model.state_dict().items()}
    with pytest.raises(UnsupportedArchitectureError, match=r"prune\.exclude") as caught:
        apply_plan(model, decide(model, groups), groups)
    assert "\n" not in str(caught.value) and "relu to" in str(caught.value)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert model.model.mid.out_features == 16 and model.config.structure is None


def test_difference_in_a_later_output_is_shown() -> None:
    model = open_network("two outputs")
    groups, image_size = trace_groups(model), (3, 8, 8)
    op = next(op for op in groups.graph.trace.ops if op.name == "max")
    wrong = op._replace(outputs=(op.outputs[0], (*op.outputs[1][:-1], frozen_axis(15, "too small"))))
    groups.graph.trace.ops[groups.graph.trace.ops.index(op)] = wrong
    with pytest.raises(UnsupportedArchitectureError) as caught:
        check_cut(groups.graph, model.model, image_size, {}, ())
    assert "max to [1, 16] (output 2) instead of max to [1, 15] (output 2)" in str(caught.value)


def masks_of(groups: TracedGroups, name: str, kept: int) -> dict[tuple[str, int], np.ndarray]:
    group = next(group for group in groups if group.name == name)
    masks = {}
    for member in group.members:
        size = member.index.max() + 1
        masks[member.parameter, member.dim] = np.isin(np.arange(size), member.index[:kept])
    return masks


def test_unequal_counts_in_tied_tensors_are_rejected() -> None:
    model = open_network("")
    groups = trace_groups(model)
    masks = masks_of(groups, "stem", 5)
    leaf = next(leaf for leaf, size in sizes_after(groups.graph, masks, ()).items() if size == 5)
    assert groups.graph.free_leaves()[leaf].size == 8
    fewer = {**masks, ("mid.weight", 1): np.arange(8) < 4}
    with pytest.raises(CheckpointError, match=r"stem\.weight would keep 5 .* mid\.weight, .* 4"):
        sizes_after(groups.graph, fewer, ())


def test_unequal_channels_in_tied_tensors_are_rejected() -> None:
    groups = trace_groups(open_network(""))
    others = {**masks_of(groups, "stem", 5), ("mid.weight", 1): np.arange(8) >= 3}
    with pytest.raises(CheckpointError, match=r"stem\.weight .* mid\.weight"):
        sizes_after(groups.graph, others, ())


def test_groups_without_a_member_are_rejected() -> None:
    model = open_network("")
    groups = trace_groups(model)
    faulty = tuple(replace(g, members=g.members[:-1]) if g.name == "stem" else g for g in groups)
    plan = decide(model, groups)
    with pytest.raises(CheckpointError, match="pruning plan: "):
        apply_plan(model, plan, TracedGroups(faulty, groups.graph))
