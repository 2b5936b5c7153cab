import copy
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from helpers.marks import one_of_each
from helpers.plain_cut import PLAIN
from helpers.tiny_models import make_base, make_images
from torch import nn

from isoprune_hf.checkpoint.modeling_isoprune import IsoPruneForImageClassification
from isoprune_hf.errors import BudgetError, CheckpointError, RecipeError
from isoprune_hf.models import load_base
from isoprune_hf.pruning import pipeline
from isoprune_hf.pruning.calibration.calibration import Calibration
from isoprune_hf.pruning.cutting.cut import apply_plan
from isoprune_hf.pruning.graph.blocks import find_blocks
from isoprune_hf.pruning.plan import PruningPlan
from isoprune_hf.pruning.prune import PruneResult, prune_model
from isoprune_hf.pruning.repairing.attention_scale import keep_scale
from isoprune_hf.pruning.score import rotate_base
from isoprune_hf.recipes import PruneRecipe


class Batches:
    """Two micro-batches and the number of times they were read."""

    def __init__(self, model: IsoPruneForImageClassification):
        images = make_images(model, 4, seed=5)
        self.batches = [(images[:2], torch.tensor([0, 1])), (images[2:], torch.tensor([2, 3]))]
        self.passes = 0

    def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        self.passes += 1
        return iter(self.batches)


def class_sums(result: PruneResult) -> dict[str, int]:
    sums: dict[str, int] = {}
    for group in result.groups:
        kept = len(result.plan.kept.get(group.name, range(group.channels)))
        sums[group.signature] = sums.get(group.signature, 0) + kept
    return sums


@pytest.mark.parametrize("family", one_of_each(["vit", "swin", "resnet", "hf-convnext"], "vit", "resnet"))
def test_several_steps_reach_the_budget_of_one(family: str, tmp_path: Path) -> None:
    model, batches = make_base(family, tmp_path), None
    batches = Batches(model)
    options = {**PLAIN, "criterion": "taylor", "target_macs": "50%", "round_to": 2, "head_ratio": 0.25}
    one = prune_model(model, PruneRecipe(**options), batches)
    three = prune_model(model, PruneRecipe(**options, steps=3), batches)
    assert batches.passes == (1 + 1) + (1 + 3)  # each pruning checks the logits of the base first
    half = one.base_cost.macs / 2
    assert 0.98 * half <= one.pruned_cost.macs <= half and 0.98 * half <= three.pruned_cost.macs <= half
    assert three.plan.achieved["pruned"] == three.pruned_cost.to_dict()
    assert three.plan.kept != one.plan.kept
    assert three.plan.fingerprint == one.plan.fingerprint
    replayed = apply_plan(model, three.plan).state_dict()
    assert all(torch.equal(tensor, replayed[name]) for name, tensor in three.model.state_dict().items())


@pytest.mark.parametrize("family", ["vit", "swin", "mobilenet_v2"])
def test_several_steps_remove_exactly_what_one_step_does(family: str, tmp_path: Path) -> None:
    model = make_base(family, tmp_path)
    bounds = {"round_to": 1, "min_keep": 3, "max_ratio": 0.6}
    options = {**PLAIN, "criterion": "l1", "ratio": 0.4, "head_ratio": 0.25, **bounds}
    one, four = (prune_model(model, PruneRecipe(**options, steps=steps)) for steps in (1, 4))
    assert class_sums(four) == class_sums(one)
    for group in four.groups:
        kept, size = four.plan.kept.get(group.name), group.head_dim or group.channels
        if kept is not None:
            width = len(kept) // len(four.plan.heads.get(group.name, (0,)))
            assert width >= 3 and size - width <= 0.6 * size


def test_channels_removed_in_a_step_stay_removed(tmp_path: Path) -> None:
    model = make_base("vit", tmp_path)
    steps = [
        prune_model(model, PruneRecipe(**PLAIN, criterion="taylor", ratio=ratio, round_to=1), Batches(model)).plan
        for ratio in (0.2,)
    ]
    both = prune_model(
        model, PruneRecipe(**PLAIN, criterion="taylor", ratio=0.4, round_to=1, steps=2), Batches(model)
    ).plan
    for name, kept in both.kept.items():
        assert set(kept) <= set(steps[0].kept.get(name, kept))


def test_next_step_begins_with_repaired_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_base("resnet", tmp_path)
    repaired = []

    def double(rotated: object, pruned: nn.Module, *args: object, **kwargs: object) -> tuple[str, ...]:
        repaired.append(pruned)
        with torch.no_grad():
            for parameter in pruned.parameters() if len(repaired) == 1 else ():
                parameter.mul_(2)
        return ()

    monkeypatch.setattr(pipeline, "repair", double)
    recipe = PruneRecipe(criterion="l1", ratio=0.4, round_to=1, steps=2, rotate=False, reconstruct="least_squares")
    result = prune_model(model, recipe, Batches(model))
    assert len(repaired) == 2
    expected = apply_plan(model, result.plan, result.groups)
    for found, cut in zip(result.model.parameters(), expected.parameters(), strict=True):
        assert torch.equal(found, 2 * cut)


def test_steps_without_effect_of_repair_cut_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_base("vit", tmp_path)
    monkeypatch.setattr(pipeline, "repair", lambda *args, **kwargs: ())
    recipe = PruneRecipe(
        criterion="l1", ratio=0.5, round_to=1, steps=3, rotate=True, reconstruct="least_squares", min_keep=1
    )
    result = prune_model(model, recipe, Batches(model))
    images = Calibration(Batches(model))
    rotated = rotate_base(model, recipe, result.groups, images)
    expected = apply_plan(rotated.model, result.plan, result.groups)
    factors = keep_scale(rotated, expected, result.plan, result.groups)
    assert factors
    for name, value in expected.state_dict().items():
        torch.testing.assert_close(result.model.state_dict()[name], value, rtol=1e-5, atol=1e-7)


def test_steps_need_batches_that_can_be_read_again(tmp_path: Path) -> None:
    model = make_base("vit", tmp_path)
    with pytest.raises(RecipeError, match=r"prune\.steps iterates"):
        prune_model(model, PruneRecipe(criterion="taylor", steps=2), iter(Batches(model)))
    scores = prune_model(model, PruneRecipe(criterion="l1")).scores
    with pytest.raises(RecipeError, match=r"prune\.steps 2"):
        prune_model(model, PruneRecipe(criterion="taylor", steps=2), scores=scores)


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        ({"target_macs": "1%"}, r"target_macs .* G cannot be reached: the smallest is .* G"),
        ({"target_params": "0.001M"}, r"target_params 0\.001 M cannot be reached: the smallest is .* M"),
        ({"target_params": "1G"}, "the base has only"),
    ],
)
def test_an_impossible_budget_is_refused_before_the_scoring(recipe, message: str, tmp_path: Path) -> None:
    model = make_base("vit", tmp_path)
    batches = Batches(model)
    with pytest.raises(BudgetError, match=message):
        prune_model(model, PruneRecipe(**recipe), batches)
    assert batches.passes == 0


def deep_base(family: str, tmp_path: Path) -> IsoPruneForImageClassification:
    if family == "convnext":
        args = {"depths": [2, 2, 2, 2], "dims": [8, 16, 24, 32], "conv_mlp": False}
        return load_base("timm/convnext_atto", False, model_args=args, num_labels=7, seed=0).model
    if family == "resnet":
        args = {"layers": [2, 2, 2, 2], "channels": [8, 8, 8, 8], "stem_width": 8, "zero_init_last": False}
        return load_base("timm/resnet50", False, model_args=args, num_labels=7, seed=0).model
    return make_base(family, tmp_path)


@pytest.mark.parametrize(
    "family",
    one_of_each(["vit", "deit", "swin", "convnext", "resnet", "mobilenet_v2", "hf-vit", "hf-swin"], "vit", "resnet"),
)
def test_removed_block_equals_identity_in_base(family: str, tmp_path: Path) -> None:
    model = deep_base(family, tmp_path).eval()
    leaving = find_blocks(model)[-1].name
    pruned = prune_model(model, PruneRecipe(criterion="l1", ratio=0.0, remove_blocks=[leaving])).model
    expected = copy.deepcopy(model)
    expected.model.get_submodule(leaving).register_forward_hook(
        lambda module, args, output: (args[0], *output[1:]) if isinstance(output, tuple) else args[0]
    )
    images = make_images(model)
    with torch.no_grad():
        assert torch.equal(pruned(images).logits, expected(images).logits)
        assert not torch.equal(pruned(images).logits, model(images).logits)
    assert pruned.config.structure["removed"] == [leaving]
    pruned.save_pretrained(tmp_path / "saved")
    again = IsoPruneForImageClassification.from_pretrained(tmp_path / "saved")
    with torch.no_grad():
        assert torch.equal(again(images).logits, pruned(images).logits)


@pytest.mark.parametrize(
    "family", one_of_each(["vit", "swin", "convnext", "resnet", "mobilenet_v2", "hf-vit"], "vit", "resnet")
)
def test_width_and_depth_meet_one_budget(family: str, tmp_path: Path) -> None:
    model = deep_base(family, tmp_path)
    recipe = PruneRecipe(criterion="l1", target_macs="50%", remove_blocks=1, round_to=1)
    result = prune_model(model, recipe)
    assert len(result.plan.removed_blocks) == 1
    assert result.plan.achieved["pruned"] == result.pruned_cost.to_dict()
    assert 0.97 <= result.pruned_cost.macs / (result.base_cost.macs / 2) <= 1
    assert not any(name.startswith(f"{result.plan.removed_blocks[0]}.") for name in result.model.model.state_dict())
    loss = result.model.train()(make_images(model), labels=torch.tensor([0, 1])).loss
    loss.backward()
    again = prune_model(result.model.eval(), PruneRecipe(criterion="l1", ratio=0.2, round_to=1))
    assert again.model.config.structure["removed"] == list(result.plan.removed_blocks)


@pytest.mark.parametrize("normalizer", ["none", "mean", "max"])
def test_named_block_leaves_in_several_steps(normalizer: str, tmp_path: Path) -> None:
    # After the first step all channels inside the block have scores below 0.
    model = deep_base("vit", tmp_path)
    leaving = find_blocks(model)[0].name
    options = {"criterion": "l1", "ratio": 0.5, "round_to": 1, "remove_blocks": [leaving], "normalizer": normalizer}
    one, two = (prune_model(model, PruneRecipe(**options, steps=steps)) for steps in (1, 2))
    assert one.plan.removed_blocks == two.plan.removed_blocks == (leaving,)
    assert sum(map(len, one.plan.kept.values())) == sum(map(len, two.plan.kept.values()))
    assert two.model(make_images(model)).logits.isfinite().all()


def test_model_with_convolution_classifier_is_cut() -> None:
    args = {"layers": [1, 1, 1, 1], "channels": [16, 16, 16, 16], "stem_chs": 8}
    model = load_base("timm/resnetv2_50", False, model_args=args, num_labels=7).model
    assert isinstance(model.model.head.fc, nn.Conv2d)
    pruned = prune_model(model, PruneRecipe(criterion="l1", ratio=0.5)).model
    assert pruned.model.head.fc.weight.shape[:2] == (7, pruned.model.norm.num_features)
    assert pruned(make_images(model)).logits.shape == (2, 7)


def test_plan_with_unknown_block_is_refused(tmp_path: Path) -> None:
    model = make_base("vit", tmp_path)
    for blocks in (("norm",), ("blocks",), ("blocks.0", "blocks.0")):
        with pytest.raises(CheckpointError, match="is not a removable residual block"):
            apply_plan(model, PruningPlan({}, {}, blocks))


def test_patterns_and_scores_reach_the_cut(tmp_path: Path) -> None:
    model = make_base("vit", tmp_path)
    recipe = PruneRecipe(criterion="l2", ratio=0.5, round_to=1, exclude=["patch_embed.*"], ratios={"blocks.0.*": 0.25})
    result = prune_model(model, recipe)
    assert result.model.model.pos_embed.shape[-1] == 32
    assert result.model.model.blocks[0].mlp.fc1.out_features == 96
    assert result.model.model.blocks[1].mlp.fc1.out_features == 64
    assert isinstance(result.model.model.blocks[1].attn.qkv, nn.Linear)


@pytest.mark.benchmarks
def test_a_share_of_the_measured_time_is_met(tmp_path: Path) -> None:
    args = {"img_size": 96, "patch_size": 8, "embed_dim": 192, "depth": 3, "num_heads": 3}
    model = load_base("timm/vit_tiny_patch16_224", False, model_args=args).model
    recipe = PruneRecipe(criterion="l1", target_latency="60%", latency_batch_size=4)
    result = prune_model(model, recipe)
    base, pruned = (result.plan.achieved[name]["latency_ms"] for name in ("base", "pruned"))
    assert 0 < pruned <= 0.6 * base
    assert result.pruned_cost.macs < result.base_cost.macs
    assert result.plan.settings["latency"]["batch_size"] == 4
