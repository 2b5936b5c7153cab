import copy
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from helpers.marks import one_of_each
from helpers.odd_networks import open_odd
from helpers.oracles import (
    NotComparableError,
    axis_counts,
    exact_logits,
    follow,
    make_images,
    mask_error,
    permutation_error,
    permute_groups,
    prunable_share,
    randomize,
    rounding_error,
    zero_removed,
)
from helpers.tiny_models import make_base
from torch import nn

from isoprune_hf.checkpoint.modeling_isoprune import IsoPruneForImageClassification
from isoprune_hf.errors import CheckpointError
from isoprune_hf.pruning.cutting.cut import apply_plan
from isoprune_hf.pruning.deciding.make_plan import make_plan
from isoprune_hf.pruning.graph.find_groups import trace_groups
from isoprune_hf.pruning.groups import CoupledGroup, Member
from isoprune_hf.pruning.plan import PruningPlan
from isoprune_hf.pruning.scoring.score_groups import score_groups
from isoprune_hf.recipes import PruneRecipe

FAMILIES = ("vit", "resnet", "swin", "convnext")
Groups = tuple[CoupledGroup, ...]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[IsoPruneForImageClassification, Groups]]:
    made: dict[str, tuple[IsoPruneForImageClassification, Groups]] = {}

    def give(family: str) -> tuple[IsoPruneForImageClassification, Groups]:
        if family not in made:
            model = make_base(family, tmp_path_factory.mktemp(family))
            randomize(model)
            made[family] = model, trace_groups(model)
        return made[family]

    return give


def cut(
    model: IsoPruneForImageClassification, groups: Groups, scope: str = "isomorphic"
) -> tuple[PruningPlan, IsoPruneForImageClassification]:
    recipe = PruneRecipe(criterion="taylor", scope=scope, ratio=0.4, head_ratio=0.3, head_dim_ratio=0.3, round_to=1)
    plan = make_plan(groups, score_groups(model, groups, criterion="random"), recipe)
    return plan, apply_plan(model, plan, groups)


def change(groups: Groups, name: str, members: tuple[Member, ...], kind: str = "members") -> Groups:
    return tuple(replace(group, **{kind: members}) if group.name == name else group for group in groups)


def first_of_each_class(groups: Groups) -> list[CoupledGroup]:
    return list({group.signature: group for group in reversed(groups)}.values())


@pytest.mark.parametrize("family", FAMILIES)
def test_groups_of_correct_engine_pass_both_oracles(family: str, base) -> None:
    model, groups = base(family)
    images = make_images(model)
    plan, pruned = cut(model, groups)
    assert permutation_error(model, groups, images) <= 1e-12
    assert mask_error(model, pruned, groups, plan, images) <= 1e-12


@pytest.mark.parametrize(
    "family", one_of_each(["vit", "resnet"], "vit") + one_of_each(["swin", "convnext"], mark="faults")
)
def test_the_permutation_sees_every_member_that_is_dropped(family: str, base) -> None:
    model, groups = base(family)
    images = make_images(model, count=1)
    for group in first_of_each_class(groups):
        for position, member in enumerate(group.members):
            faulty = change(groups, group.name, group.members[:position] + group.members[position + 1 :])
            assert permutation_error(model, faulty, images) > 1e-9, (group.name, member.parameter)


def test_permutation_detects_dropped_table_of_heads(base) -> None:
    model, groups = base("swin")
    group = next(group for group in groups if group.head_members)
    faulty = change(groups, group.name, (), "head_members")
    assert permutation_error(model, faulty, make_images(model)) > 1e-9


@pytest.mark.parametrize("family", one_of_each(FAMILIES, "vit", "resnet"))
def test_both_oracles_see_an_index_that_is_shifted(family: str, base) -> None:
    model, groups = base(family)
    images = make_images(model, count=1)
    for group in first_of_each_class(groups):
        member = group.members[-1]
        shifted = replace(member, index=np.roll(member.index, 1, axis=0))
        faulty = change(groups, group.name, (*group.members[:-1], shifted))
        assert permutation_error(model, faulty, images) > 1e-9, group.name
        plan, pruned = cut(model, groups)
        assert mask_error(model, pruned, faulty, plan, images) > 1e-6, group.name


@pytest.mark.parametrize("family", ["vit", "resnet", "swin"])
def test_both_oracles_see_members_that_changed_groups(family: str, base) -> None:
    model, groups = base(family)
    images = make_images(model, count=1)
    pair = next(
        (one, other)
        for number, one in enumerate(groups)
        for other in groups[number + 1 :]
        if one.signature == other.signature and one.channels == other.channels and not one.num_heads
        if one.members[-1].index.shape == other.members[-1].index.shape
        if np.array_equal(one.members[-1].index, other.members[-1].index)
    )
    faulty = groups
    for group, other in (pair, pair[::-1]):
        faulty = change(faulty, group.name, (*group.members[:-1], other.members[-1]))
    assert permutation_error(model, faulty, images) > 1e-9
    with pytest.raises(CheckpointError, match="would keep other channels than"):
        cut(model, faulty, scope="local")  # widths stay alike
    plan, pruned = cut(model, groups, scope="local")
    assert mask_error(model, pruned, faulty, plan, images) > 1e-6


def test_mask_follows_the_fast_path_of_attention() -> None:
    model = open_odd("bare_tokens").model
    randomize(model)
    groups = trace_groups(model)
    plan, pruned = cut(model, groups)
    attention, whole = (net.model.get_submodule("attention") for net in (pruned, model))
    assert attention.embed_dim // attention.num_heads < whole.head_dim  # the temperature differs
    images = make_images(model).double()
    with torch.no_grad():
        fast = copy.deepcopy(pruned).double().eval()(images).logits  # as a user runs it
    torch.testing.assert_close(fast, exact_logits(pruned, images), rtol=1e-12, atol=1e-12)
    assert mask_error(model, pruned, groups, plan, images) < 1e-12


def test_mask_detects_channels_that_differ_from_plan(base) -> None:
    model, groups = base("vit")
    plan, pruned = cut(model, groups)
    name = next(group.name for group in groups if not group.num_heads)
    others = tuple(np.setdiff1d(np.arange(32), plan.kept[name])[: len(plan.kept[name])].tolist())
    assert (
        mask_error(model, pruned, groups, replace(plan, kept={**plan.kept, name: others}), make_images(model)) > 1e-6
    )


def test_permutation_moves_all_weights_mask_only_removed(base) -> None:
    model, groups = base("vit")
    plan, pruned = cut(model, groups)
    before, after = model.model.state_dict(), permute_groups(model, groups).model.state_dict()
    moved = [name for name in before if not torch.equal(before[name], after[name])]
    assert set(moved) == {member.parameter for group in groups for member in group.members}
    masked = zero_removed(model, groups, plan).model.state_dict()
    kept = {name: int((tensor != 0).sum()) for name, tensor in masked.items()}
    assert kept == {name: int((tensor != 0).sum()) for name, tensor in pruned.model.state_dict().items()}
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.model.state_dict().items())


def test_tied_head_dims_move_alike_in_every_head(base) -> None:
    index = np.arange(12).reshape(12, 1)
    group = CoupledGroup("attention", "", 12, (Member("weight", 0, index),), num_heads=3)
    object.__setattr__(group, "dim_members", (Member("norm", 0, np.arange(4).reshape(4, 1)),))
    model = nn.Module()
    model.model = nn.Module()
    model.model.weight, model.model.norm = (nn.Parameter(torch.arange(float(size))) for size in (12, 4))
    permuted = permute_groups(model, (group,)).model
    by_head = permuted.weight.reshape(3, 4)
    assert sorted((by_head[:, 0] // 4).tolist()) == [0, 1, 2]
    assert all(torch.equal(head % 4, permuted.norm) for head in by_head)
    assert permuted.norm.tolist() != model.model.norm.tolist()


def test_axis_counts_are_the_channels_of_each_class(base) -> None:
    _, groups = base("vit")
    assert sorted(axis_counts(groups).values()) == [[32], [32, 32], [128, 128]]


def test_prunable_share_omits_parameters_outside_groups(base) -> None:
    model, groups = base("vit")
    biases = model.model.head.bias.numel()
    total = sum(parameter.numel() for parameter in model.model.parameters())
    assert prunable_share(model, groups) == pytest.approx(1 - biases / total)
    assert prunable_share(model, ()) == 0


KEPT = torch.tensor([0, 2, 3, 6, 7, 9])
STATISTICS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "layer norm": lambda x: nn.functional.layer_norm(x, x.shape[-1:]),
    "group norm": lambda x: nn.functional.group_norm(x.movedim(-1, 1), 1).movedim(1, -1),
    "rms norm": lambda x: nn.functional.rms_norm(x, x.shape[-1:]),
    "mean": lambda x: x * x.square().mean(-1, keepdim=True),
    "variance": lambda x: x * x.var(-1, keepdim=True),
    "deviation and mean": lambda x: x * torch.cat(torch.std_mean(x, -1, keepdim=True), -1).sum(-1, keepdim=True),
    "softmax": lambda x: x.softmax(-1),
    "maximum": lambda x: x * (x - 9).where(x != 0, x - x).amin() * x.amax(-1, keepdim=True),
    "normalize": lambda x: nn.functional.normalize(x, dim=-1),
    "live width": lambda x: x * x.shape[-1] ** -0.5,
    "standardised weight": lambda x: nn.functional.batch_norm(x.flatten(0, 1)[None], None, None, training=True)[0],
    "attention": lambda x: nn.functional.scaled_dot_product_attention(x[None], x[None], x[None])[0],
}


@pytest.mark.parametrize("name", STATISTICS)
def test_statistic_ignores_zeroed_elements(name: str) -> None:
    values = torch.randn(2, 5, 10, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    zeroed = torch.zeros_like(values).index_copy(-1, KEPT, values[..., KEPT])
    run = STATISTICS[name]
    found, expected = follow(lambda: run(values[..., KEPT]), lambda: run(zeroed))
    torch.testing.assert_close(expected[..., KEPT], found, rtol=1e-12, atol=1e-12)


def test_statistic_over_nonzero_removed_values_has_no_reference() -> None:
    values = torch.rand(2, 10) + 1
    with pytest.raises(NotComparableError, match="a mean "):
        follow(lambda: values[:, :6].mean(1), lambda: values.mean(1))
    with pytest.raises(NotComparableError, match="a softmax "):
        follow(lambda: values[:, :6].softmax(1), lambda: values.softmax(1))
    with pytest.raises(NotComparableError, match=r"aten\.mul .*aten\.add"):
        follow(lambda: values + 1, lambda: values * 2)
    with pytest.raises(NotComparableError, match="more operations"):
        follow(lambda: values + 1, lambda: values)


def test_float32_network_is_judged_in_float64(base) -> None:
    class Narrow(nn.Module):
        def forward(self, hidden: torch.Tensor) -> torch.Tensor:
            return hidden.float().softmax(-1, dtype=torch.float32).to(hidden.dtype)

    model, _ = base("vit")
    head, model.model.head = model.model.head, nn.Sequential(model.model.head, Narrow())
    try:
        logits = exact_logits(model, make_images(model))
    finally:
        model.model.head = head
    torch.testing.assert_close(logits.sum(-1), torch.ones(2, dtype=torch.float64), rtol=0, atol=1e-15)


def test_last_bits_of_the_weights_move_the_output(base) -> None:
    model, _ = base("vit")
    images = make_images(model)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    assert 1e-17 < rounding_error(model, images) < 1e-13  # float64 has 2e-16
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
