import copy
import json
from pathlib import Path

import pytest
import torch
from helpers.marks import one_of_each
from helpers.masking import masked_base, plan_random
from helpers.tiny_models import ALL_FAMILIES, FAMILIES, make_base, make_images
from helpers.traced_models import make_timm
from torch import nn

from isoprune_hf.errors import CheckpointError
from isoprune_hf.models import load_base
from isoprune_hf.pruning.cost.macs import count_cost
from isoprune_hf.pruning.cutting.cut import apply_plan
from isoprune_hf.pruning.deciding.make_plan import make_plan
from isoprune_hf.pruning.graph.find_groups import trace_groups
from isoprune_hf.pruning.plan import PruningPlan
from isoprune_hf.pruning.scoring.score_groups import score_groups
from isoprune_hf.recipes import PruneRecipe


@pytest.mark.parametrize("family", one_of_each(ALL_FAMILIES, "vit", "swin", "resnet"))
def test_cut_equals_base_with_removed_elements_zeroed(family: str, tmp_path: Path) -> None:
    model = make_base(family, tmp_path).double()
    groups, plan = plan_random(model)
    assert len(plan.kept) >= 0.8 * len(groups)
    pruned = apply_plan(model, plan, groups)
    images = make_images(model).double()
    with torch.no_grad():
        expected = masked_base(model, groups, plan)(images).logits
        found, dense = pruned(images).logits, model(images).logits
    assert (found - expected).abs().max() <= 1e-9 * expected.abs().max()
    assert (found - dense).abs().max() > 1e-2 * dense.abs().max()


@pytest.mark.parametrize("family", FAMILIES)
def test_ratio_zero_changes_nothing_bit_for_bit(family: str, tmp_path: Path) -> None:
    model = make_base(family, tmp_path)
    groups, plan = plan_random(model, ratio=0.0, head_ratio=0.0, head_dim_ratio=0.0)
    assert plan.kept == {} and plan.heads == {}
    pruned = apply_plan(model, plan, groups)
    assert pruned.config.structure == {"shapes": {}, "attributes": {}, "removed": []}
    with torch.no_grad():
        assert torch.equal(pruned(make_images(model)).logits, model(make_images(model)).logits)


@pytest.mark.parametrize("family", FAMILIES)
def test_cut_model_trains_copies_and_costs_as_planned(family: str, tmp_path: Path) -> None:
    model = make_base(family, tmp_path)
    before = copy.deepcopy(model.state_dict())
    groups, plan = plan_random(model, round_to=2)
    pruned = apply_plan(model, plan, groups)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert count_cost(pruned).to_dict() == plan.achieved["pruned"]
    pruned.train()
    loss = pruned(make_images(model), labels=torch.tensor([0, 1])).loss
    loss.backward()
    gradients = [p.grad for p in pruned.parameters() if p.grad is not None]
    assert gradients and all(torch.isfinite(gradient).all() for gradient in gradients)
    pruned.eval()
    with torch.no_grad():
        assert torch.equal(copy.deepcopy(pruned)(make_images(model)).logits, pruned(make_images(model)).logits)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_layer_knows_the_size_of_its_tensors(family: str, tmp_path: Path) -> None:
    model = make_base(family, tmp_path)
    groups, plan = plan_random(model)
    for name, module in apply_plan(model, plan, groups).model.named_modules():
        if isinstance(module, nn.Linear):
            assert (module.out_features, module.in_features) == tuple(module.weight.shape), name
        if isinstance(module, nn.Conv2d):
            sizes = (module.out_channels, module.in_channels // module.groups)
            assert sizes == tuple(module.weight.shape[:2]), name
        if isinstance(module, nn.BatchNorm2d):
            sizes = {len(t) for t in (module.weight, module.bias, module.running_mean, module.running_var)}
            assert sizes == {module.num_features}, name
        if isinstance(module, nn.LayerNorm):
            assert module.normalized_shape == tuple(module.weight.shape) == tuple(module.bias.shape), name


def test_attention_numbers_follow_heads_and_dims(tmp_path: Path) -> None:
    model = make_base("vit", tmp_path)
    groups, plan = plan_random(model)
    pruned = apply_plan(model, plan, groups)
    for group in groups:
        if group.num_heads:
            attention = pruned.model.get_submodule(group.name)
            heads = len(plan.heads[group.name])
            assert attention.num_heads == heads
            assert attention.attn_dim == len(plan.kept[group.name]) == attention.proj.in_features
            assert attention.head_dim == attention.attn_dim // heads
            assert attention.scale == attention.head_dim**-0.5
            assert attention.qkv.out_features == 3 * attention.attn_dim


def test_fused_and_eager_attention_agree_after_the_cut(tmp_path: Path) -> None:
    model = make_base("vit", tmp_path)
    groups, plan = plan_random(model)
    pruned = apply_plan(model, plan, groups)
    with torch.no_grad():
        fused = pruned(make_images(model)).logits
        for module in pruned.modules():
            if hasattr(module, "fused_attn"):
                module.fused_attn = False
        eager = pruned(make_images(model)).logits
    torch.testing.assert_close(fused, eager, atol=1e-5, rtol=1e-5)


@pytest.mark.export
@pytest.mark.parametrize("family", one_of_each(["vit", "resnet"], "vit", mark="faults"))
def test_the_cut_model_compiles_without_graph_breaks(family: str, tmp_path: Path) -> None:
    model = make_base(family, tmp_path)
    groups, plan = plan_random(model)
    pruned = apply_plan(model, plan, groups).eval()
    images = make_images(model)
    with torch.no_grad():
        compiled = torch.compile(pruned, fullgraph=True)(images).logits
        torch.testing.assert_close(compiled, pruned(images).logits, atol=1e-4, rtol=1e-4)


def test_replayed_plan_gives_bit_equal_tensors(tmp_path: Path) -> None:
    model = make_base("deit", tmp_path)
    groups, plan = plan_random(model)
    first = apply_plan(model, plan, groups).state_dict()
    second = apply_plan(model, PruningPlan.from_json(plan.to_json())).state_dict()
    assert first.keys() == second.keys()
    assert all(torch.equal(tensor, second[name]) for name, tensor in first.items())


def test_kept_rows_of_fused_qkv_equal_base_rows(tmp_path: Path) -> None:
    model = make_base("vit", tmp_path)
    groups, plan = plan_random(model)
    pruned = apply_plan(model, plan, groups)
    name = "blocks.0.attn"
    stream = torch.tensor(plan.kept["patch_embed.proj"])
    rows = torch.tensor([part * 32 + channel for part in range(3) for channel in plan.kept[name]])
    expected = model.model.blocks[0].attn.qkv.weight[rows][:, stream]
    assert torch.equal(pruned.model.blocks[0].attn.qkv.weight, expected)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda plan: plan["kept"].update({"nowhere": [0]}), "no group 'nowhere'"),
        (lambda plan: plan["kept"].update({"blocks.0.mlp.fc1": []}), "of blocks.0.mlp.fc1 must be"),
        (lambda plan: plan["kept"].update({"blocks.0.mlp.fc1": [3, 1]}), "of blocks.0.mlp.fc1 must be"),
        (lambda plan: plan["kept"].update({"blocks.0.mlp.fc1": [0, 128]}), "from 0 to 127"),
        (lambda plan: plan["kept"].update({"blocks.0.attn": [0, 1, 8]}), "same number of dims"),
        (lambda plan: plan["heads"].update({"blocks.0.attn": [0, 1, 2, 3]}), "same number of dims"),
        (lambda plan: plan.update({"version": 2}), "version 2, this code reads 1"),
        (lambda plan: plan.pop("heads"), "not a plan"),
    ],
)
def test_plan_that_does_not_fit_is_refused(change, message: str, tmp_path: Path) -> None:
    model = make_base("vit", tmp_path)
    _, plan = plan_random(model)
    values = json.loads(plan.to_json())
    change(values)
    with pytest.raises(CheckpointError, match=message):
        apply_plan(model, PruningPlan.from_json(json.dumps(values)))


def test_heads_of_one_dim_are_cut() -> None:
    sizes = {"img_size": 112, "embed_dim": 32, "depths": (1, 1), "num_heads": (2, 2)}
    model = load_base("timm/swin_tiny_patch4_window7_224", pretrained=False, model_args=sizes).model
    groups = trace_groups(model)
    recipe = PruneRecipe(criterion="taylor", head_ratio=0.0, head_dim_ratio=1.0, min_keep=1, round_to=1)
    plan = make_plan(groups, score_groups(model, groups, criterion="random"), recipe)
    assert [len(plan.kept[name]) for name in plan.heads] == [2, 2]
    pruned = apply_plan(model, plan, groups)
    assert pruned.config.cost["pruned"] == count_cost(pruned).to_dict()


def test_rotary_periods_are_cut_with_their_heads() -> None:
    model = make_timm("vit_small_patch16_dinov3", 32, embed_dim=96, num_heads=4, depth=1)
    groups = trace_groups(model)
    group = next(group for group in groups if any(member.parameter == "rope.periods" for member in group.members))
    pruned = apply_plan(model, PruningPlan({group.name: tuple(range(group.channels // 2))}, {}), groups)
    assert pruned.model.rope.dim == 4 * len(pruned.model.rope.periods) == 12
    assert pruned.model.num_features == 48
