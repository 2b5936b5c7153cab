from typing import Any

import pytest
import timm
import torch
from helpers.odd_networks import Block, calibration_batches
from torch import Tensor, nn

from isoprune_hf.checkpoint.modeling_isoprune import IsoPruneConfig, IsoPruneForImageClassification
from isoprune_hf.errors import UnsupportedArchitectureError
from isoprune_hf.pruning.cost.macs import RemovedUnits, cost_model, count_cost
from isoprune_hf.pruning.cutting.cut import apply_plan
from isoprune_hf.pruning.deciding.make_plan import make_plan
from isoprune_hf.pruning.graph.axis import find, is_frozen
from isoprune_hf.pruning.graph.find_groups import TracedGroups, trace_groups
from isoprune_hf.pruning.plan import PruningPlan
from isoprune_hf.pruning.prune import prune_model
from isoprune_hf.pruning.scoring.score_groups import score_groups
from isoprune_hf.recipes import PruneRecipe


class ReadsValues(nn.Module):
    """A part that no trace follows: it reads a value, then fails for images of zeros."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(32, 5)

    def forward(self, hidden: Tensor) -> Tensor:
        if not bool(hidden.detach().abs().sum() > 1e-6):
            raise ValueError("an empty image")
        return self.layer(hidden.mean((2, 3)))


class Trained(nn.Module):
    """A network with a part that runs in train mode only.

    head: a classifier on maps; attention: a second reader of the dims of heads; fails: a part that cannot be traced;
    token: a parameter that no mode reads; literal: a width in the code; closed: no pass in train mode at all; random:
    a dropout after a value is read, so that no pass runs on the meta device.
    """

    def __init__(self, kind: str, num_classes: int):
        super().__init__()
        self.kind, self.num_classes = kind, num_classes
        self.stem, self.block, self.head = nn.Conv2d(3, 32, 4, 4), Block(), nn.Linear(32, num_classes)
        if kind == "head":
            self.part: Any = nn.Sequential(
                nn.AdaptiveAvgPool2d(2), nn.Conv2d(32, 6, 1), nn.BatchNorm2d(6), nn.Flatten(), nn.Linear(24, 5)
            )
        elif kind == "attention":
            self.attention, self.part = nn.MultiheadAttention(32, 4, batch_first=True), nn.Linear(8, 5)
        elif kind == "fails":
            self.part = ReadsValues()
        elif kind == "token":
            self.part = nn.Parameter(torch.zeros(32))

    def forward(self, images: Tensor) -> Tensor:
        hidden = self.block(self.stem(images))
        logits = self.head(hidden.mean((2, 3)))
        if self.kind == "attention":
            tokens = hidden.flatten(2).transpose(1, 2)
            attended = self.attention(tokens, tokens, tokens, need_weights=False)[0]
            logits = self.head(attended.mean(1))
            if self.training:
                values = nn.functional.linear(tokens, self.attention.in_proj_weight[-self.attention.embed_dim :])
                heads = values.unflatten(-1, (self.attention.num_heads, -1))
                return logits + self.part(heads.mean((1, 2)))
        if self.training and self.kind == "literal":
            return logits + hidden.view(len(hidden), 32, 64).mean((1, 2))[:, None]
        if self.training and self.kind == "closed":
            raise RuntimeError("this network is not trained")
        if self.kind == "random":
            return nn.functional.dropout(logits, 0.5, self.training) + float(hidden.detach().sum())
        if self.training and self.kind in ("head", "fails"):
            return logits + self.part(hidden)
        return logits


@timm.models.register_model
def isoprune_test_trained(num_classes: int = 1000, kind: str = "", **_: object) -> nn.Module:
    return Trained(kind, num_classes)


def open_trained(kind: str) -> IsoPruneForImageClassification:
    base = {"library": "timm", "architecture": "isoprune_test_trained", "args": {"kind": kind}}
    return IsoPruneForImageClassification(IsoPruneConfig(base=base, num_labels=5, image_size=[3, 32, 32])).eval()


def decide(model: IsoPruneForImageClassification, groups: TracedGroups) -> PruningPlan:
    recipe = PruneRecipe(criterion="l1", ratio=0.5, scope="local", round_to=1)
    return make_plan(groups, score_groups(model, groups, criterion="l1"), recipe)


def members(groups: TracedGroups) -> set[str]:
    return {
        member.parameter for group in groups for member in (*group.members, *group.head_members, *group.dim_members)
    }


def train_once(model: IsoPruneForImageClassification) -> Tensor:
    images, labels = calibration_batches(3)[0]
    loss = model.train()(images, labels=labels).loss
    loss.backward()
    return loss


@pytest.mark.parametrize("engine", ["axes", "torch-pruning"])
def test_train_mode_part_is_cut_with_its_input(engine: str) -> None:
    model = open_trained("head")
    groups = trace_groups(model, engine=engine)
    assert not any("part" in name for name in members(groups))
    plan = decide(model, groups)
    pruned = apply_plan(model, plan, groups)
    assert pruned.model.part[1].weight.shape == (6, 16, 1, 1)
    kept = list(plan.kept["stem"])
    assert torch.equal(pruned.model.part[1].weight, model.model.part[1].weight[:, kept])
    assert train_once(pruned).isfinite()
    assert cost_model(model, groups).cost(*RemovedUnits.of_plan(plan, groups)) == count_cost(pruned)


def test_part_of_train_mode_does_not_change_scores() -> None:
    model, plain = open_trained("head"), open_trained("")
    plain.load_state_dict(model.state_dict(), strict=False)
    found, expected = (score_groups(each, trace_groups(each), criterion="l1") for each in (model, plain))
    assert found.scores.keys() == expected.scores.keys()
    assert all(torch.equal(found.scores[name], expected.scores[name]) for name in expected.scores)


def test_dims_of_heads_that_training_reads_are_frozen() -> None:
    model = open_trained("attention")
    groups = trace_groups(model)
    assert not any(group.num_heads for group in groups)
    assert train_once(apply_plan(model, decide(model, groups), groups)).isfinite()


def test_inputs_of_a_part_that_fails_are_frozen() -> None:
    model = open_trained("fails")
    groups = trace_groups(model)
    assert is_frozen(find(groups.graph.trace.tensors["stem.weight"][0]))
    assert train_once(apply_plan(model, decide(model, groups), groups)).isfinite()
    result = prune_model(model, PruneRecipe(target_macs="60%", round_to=1), calibration_batches(3))
    (note,) = (note for note in result.plan.notes if note.startswith("part"))
    assert "train mode" in note and "keep their widths" in note


def test_width_that_only_training_needs_is_refused() -> None:
    model = open_trained("literal")
    groups = trace_groups(model)
    with pytest.raises(UnsupportedArchitectureError, match="train mode"):
        apply_plan(model, decide(model, groups), groups)


def test_base_that_cannot_be_trained_is_cut() -> None:
    model = open_trained("closed")
    groups = trace_groups(model)
    assert apply_plan(model, decide(model, groups), groups).model.block.conv1.weight.shape[1] == 16


def test_check_keeps_statistics_and_random_state() -> None:
    model = open_trained("random")
    groups = trace_groups(model)
    assert not groups.graph.on_meta
    before, state = {key: value.clone() for key, value in model.state_dict().items()}, torch.get_rng_state()
    plan = decide(model, groups)
    pruned = apply_plan(model, plan, groups)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    kept = list(plan.kept["block.conv1"])
    assert torch.equal(pruned.model.block.norm1.running_var, model.model.block.norm1.running_var[kept])
    assert pruned.model.block.norm1.num_batches_tracked == 0 and not pruned.training


def test_parameter_that_no_mode_reads_changes_nothing() -> None:
    trace = trace_groups(open_trained("token")).graph.trace
    plain = trace_groups(open_trained("")).graph.trace
    assert not trace.train_only and not trace.notes
    assert [op.name for op in trace.ops] == [op.name for op in plain.ops]
    assert len(trace.equations) == len(plain.equations) and len(trace.comparisons) == len(plain.comparisons)
