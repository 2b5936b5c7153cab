"""Gate gradients, compared with differences of losses for scaled weights, image by image."""

import functools
import weakref
from collections.abc import Callable
from pathlib import Path

import pytest
import timm
import torch
from accelerate import Accelerator
from helpers.plain_scores import Batches, batches_of
from helpers.ranks import call_on_ranks
from helpers.tiny_models import FAMILIES, make_base
from helpers.traced_models import make_timm
from safetensors.torch import load_file, save_file
from torch import nn
from torchvision.models import VisionTransformer

from isoprune_hf.checkpoint.modeling_isoprune import IsoPruneForImageClassification
from isoprune_hf.errors import RecipeError
from isoprune_hf.pruning.calibration.calibration import Calibration
from isoprune_hf.pruning.graph.find_groups import trace_groups
from isoprune_hf.pruning.groups import CoupledGroup
from isoprune_hf.pruning.scoring import gate_gradients as gates
from isoprune_hf.pruning.scoring.criteria import gate_fisher as criterion
from isoprune_hf.pruning.scoring.criteria.gate_fisher import gate_fisher, gate_fisher_joint, remove_in_turn
from isoprune_hf.pruning.scoring.gate_gradients import gate_gradients
from isoprune_hf.pruning.scoring.gate_points import find_gate_points
from isoprune_hf.pruning.scoring.score_groups import score_groups

STEP = 1e-6
# Parameter, dim, and the positions of channel c there; by default position c.
Place = tuple[str, int] | tuple[str, int, Callable[[int], list[int]]]


@timm.models.register_model
def tiny_torchvision_vit(num_classes: int = 1000, **_: object) -> nn.Module:
    """Build torchvision's ViT, whose nn.MultiheadAttention uses the weights of its layers without calling them."""
    return VisionTransformer(16, 4, num_layers=1, num_heads=4, hidden_dim=32, mlp_dim=48, num_classes=num_classes)


def make_torchvision_vit() -> IsoPruneForImageClassification:
    model = make_timm("tiny_torchvision_vit", 16)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            scale = 1.0 if parameter.ndim == 1 else parameter[0].numel() ** -0.5
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * scale)
    return model


def group_with(groups: tuple[CoupledGroup, ...], parameter: str, dim: int) -> CoupledGroup:
    return next(g for g in groups if any((m.parameter, m.dim) == (parameter, dim) for m in g.members))


def removal_loss(model: IsoPruneForImageClassification, batches: Batches, places: list[Place], channel: int) -> float:
    """Compute E[g^2] / 2 by central differences: the elements of a channel are scaled by 1 + STEP and by 1 - STEP."""
    parameters = dict(model.model.named_parameters())

    def loss(factor: float, image: torch.Tensor, label: torch.Tensor) -> float:
        kept = {name: parameters[name].detach().clone() for name, *_ in places}
        with torch.no_grad():
            for name, dim, *where in places:
                for number in where[0](channel) if where else [channel]:
                    parameters[name].select(dim, number).mul_(factor)
            value = nn.functional.cross_entropy(model(pixel_values=image[None]).logits, label[None]).item()
            for name, before in kept.items():
                parameters[name].copy_(before)
        return value

    pairs = [pair for images, labels in batches for pair in zip(images, labels, strict=True)]
    slopes = [(loss(1 + STEP, *pair) - loss(1 - STEP, *pair)) / (2 * STEP) for pair in pairs]
    return sum(slope**2 for slope in slopes) / (2 * len(slopes))


def four_in_a_row(channel: int) -> list[int]:
    return list(range(4 * channel, 4 * channel + 4))


def one_of_each_head(channel: int) -> list[int]:
    return [8 * head + channel for head in range(4)]


STREAM = [(f"blocks.{block}.{layer}.weight", 1) for block in (0, 1) for layer in ("attn.qkv", "mlp.fc1")]
# What a gate multiplies. Queries and what reads the values stand for both points of both products in an attention.
CASES: dict[str, tuple[str, tuple[str, int], list[Place]]] = {
    "mlp": ("vit", ("blocks.0.mlp.fc1.weight", 0), [("blocks.0.mlp.fc2.weight", 1)]),
    "conv": ("resnet", ("layer2.0.conv1.weight", 0), [("layer2.0.conv2.weight", 1)]),
    "stream": ("vit", ("blocks.0.mlp.fc2.weight", 0), [*STREAM, ("head.weight", 1)]),
    "attention": (
        "vit",
        ("blocks.1.attn.proj.weight", 1),
        [("blocks.1.attn.qkv.weight", 0), ("blocks.1.attn.qkv.bias", 0), ("blocks.1.attn.proj.weight", 1)],
    ),
    "separate queries": (
        "hf-vit",
        ("vit.layers.0.attention.o_proj.weight", 1),
        [
            ("vit.layers.0.attention.q_proj.weight", 0),
            ("vit.layers.0.attention.q_proj.bias", 0),
            ("vit.layers.0.attention.o_proj.weight", 1),
        ],
    ),
    "depthwise": (
        "mobilenet_v2",
        ("features.2.conv.0.0.weight", 0),
        [("features.2.conv.2.weight", 1)],
    ),
    # The stream is as wide as all heads together: four of its 32 channels are coupled to one dim of each head.
    "weights without a call": (
        "torchvision",
        ("encoder.layers.encoder_layer_0.self_attention.out_proj.weight", 1),
        [
            ("encoder.layers.encoder_layer_0.self_attention.in_proj_weight", 1, four_in_a_row),
            ("encoder.layers.encoder_layer_0.self_attention.out_proj.weight", 1, one_of_each_head),
            ("encoder.layers.encoder_layer_0.mlp.0.weight", 1, four_in_a_row),
            ("heads.head.weight", 1, four_in_a_row),
        ],
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_score_is_half_the_mean_squared_slope(case: str, tmp_path: Path) -> None:
    family, (parameter, dim), places = CASES[case]
    model = (make_torchvision_vit() if family == "torchvision" else make_base(family, tmp_path)).double().eval()
    batches = [(images.double(), labels) for images, labels in batches_of(model, [2, 1])]
    group = group_with(trace_groups(model), parameter, dim)
    score = gate_fisher(model, [group], Calibration(batches))[group.name]
    assert score.shape == (group.channels,) and score.dtype == torch.float64
    channels = torch.linspace(0, group.channels - 1, 6).long().tolist()
    expected = [removal_loss(model, batches, places, channel) for channel in channels]
    torch.testing.assert_close(score[channels], torch.tensor(expected, dtype=torch.float64), rtol=1e-4, atol=1e-12)
    assert max(expected) > 1e-8


def test_removal_in_turn_by_hand() -> None:
    # Channel 2 leaves at 0.9, then 0 at 1; 1 would cost 1.2 - 2 x 0.5 and gets the score of 0. The last one, 3, costs
    # 2 + 2 x 0.25 for each of the channels 0 and 2.
    losses = torch.tensor(
        [[1.0, -0.5, 0.0, 0.25], [-0.5, 1.2, 0.0, 0.0], [0.0, 0.0, 0.9, 0.25], [0.25, 0.0, 0.25, 2.0]],
        dtype=torch.float64,
    )
    assert remove_in_turn(losses.flatten(), 4).tolist() == [1.0, 1.0, 0.9, 3.0]


def test_joint_score_is_loss_of_growing_sets(tmp_path: Path) -> None:
    model = make_base("vit", tmp_path)
    batches = batches_of(model, [3, 2])
    group = group_with(trace_groups(model), "blocks.0.mlp.fc1.weight", 0)
    scores = gate_fisher_joint(model, [group], Calibration(batches))[group.name]
    points, factors = find_gate_points(model, [group])
    parts = [gradients for gradients, _ in gate_gradients(model, points, batches)]
    slopes = torch.cat([sum(factors[group.name] * part.double().sum(2) for part in batch) for batch in parts])

    def loss(removed: list[int]) -> float:
        return float(slopes[:, removed].sum(1).square().mean()) / 2

    removed: list[int] = []
    highest = 0.0
    for _ in range(12):
        left = [channel for channel in range(group.channels) if channel not in removed]
        costs = {channel: loss([*removed, channel]) - loss(removed) for channel in left}
        cheapest = min(costs, key=costs.__getitem__)
        highest = max(highest, costs[cheapest])
        assert float(scores[cheapest]) == pytest.approx(highest, rel=1e-6)
        removed.append(cheapest)


def test_joint_losses_need_one_set_of_matrices(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_base("vit", tmp_path)
    groups = trace_groups(model)
    sums: set[int] = set()
    matrices: list[weakref.ref[torch.Tensor]] = []
    remaining = criterion.remaining

    def record_sums(running, batches):
        sums.update(total.data_ptr() for total in running.values())
        return remaining(running, batches)

    def record_matrix(losses: torch.Tensor, channels: int) -> torch.Tensor:
        assert losses.data_ptr() in sums  # divided in place
        assert all(matrix() is None for matrix in matrices)  # the earlier ones are released
        matrices.append(weakref.ref(losses))
        return losses[:channels].clone()

    monkeypatch.setattr(criterion, "remaining", record_sums)
    monkeypatch.setattr(criterion, "remove_in_turn", record_matrix)
    gate_fisher_joint(model, groups, Calibration(batches_of(model, [2, 1])))
    assert len(matrices) == len(groups)


def test_matrices_are_created_after_the_check(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []
    check, products = gates._is_batch_way_right, criterion.triangle_of_products

    def record_check(*args) -> bool:
        order.append("check")
        return check(*args)

    def record_products(factors: torch.Tensor) -> torch.Tensor:
        order.append("images" if len(factors) else "matrix")
        return products(factors)

    monkeypatch.setattr(gates, "_is_batch_way_right", record_check)
    monkeypatch.setattr(criterion, "triangle_of_products", record_products)
    model = make_base("vit", tmp_path)
    groups = trace_groups(model)
    gate_fisher_joint(model, groups, Calibration(batches_of(model, [2, 1])))
    assert order == ["check", *["matrix"] * len(groups), *["images"] * 2 * len(groups)]


@pytest.mark.parametrize("family", FAMILIES)
def test_batch_gates_equal_weight_gates(family: str, tmp_path: Path, monkeypatch) -> None:
    model = make_base(family, tmp_path)
    groups, batches = trace_groups(model), batches_of(model, [3])
    points, _ = find_gate_points(model, groups)
    ((quick, _),) = gate_gradients(model, points, batches)
    called = []
    monkeypatch.setattr(gates, "_batch_gates", lambda *_: called.append("quick"))
    monkeypatch.setattr(gates, "_is_batch_way_right", lambda *_: False)
    ((slow, _),) = gate_gradients(model, points, batches)
    assert not called
    largest = max(gradient.abs().max() for gradient in slow)
    for one, two in zip(quick, slow, strict=True):
        assert len(one) == 3
        torch.testing.assert_close(one.sum(2), two.sum(2), rtol=1e-3, atol=1e-4 * float(largest))


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_uses_batch_gates(family: str, tmp_path: Path, monkeypatch) -> None:
    model = make_base(family, tmp_path)
    points, _ = find_gate_points(model, trace_groups(model))
    sizes, original = [], gates._batch_gates
    monkeypatch.setattr(gates, "_batch_gates", lambda *args: sizes.append(len(args[2])) or original(*args))
    assert len(list(gate_gradients(model, points, batches_of(model, [2])))) == 1
    assert sizes == [2, 2]  # the trial, and the batch itself


def test_weights_without_a_call_use_weight_gates(monkeypatch) -> None:
    model = make_torchvision_vit()
    sizes, original = [], gates._weight_gates
    monkeypatch.setattr(gates, "_weight_gates", lambda *args: sizes.append(len(args[2])) or original(*args))
    groups = trace_groups(model)
    scores = score_groups(model, groups, criterion="gate_fisher", batches=batches_of(model, [2, 3])).scores
    assert sizes == [2, 3]
    assert all(torch.isfinite(score).all() and (score > 0).any() for score in scores.values())


def test_channel_without_effect_on_loss_scores_zero(tmp_path: Path) -> None:
    model = make_base("vit", tmp_path)
    with torch.no_grad():
        model.model.blocks[1].mlp.fc2.weight[:, 5] = 0
    group = group_with(trace_groups(model), "blocks.1.mlp.fc1.weight", 0)
    score = gate_fisher(model, [group], Calibration(batches_of(model, [2])))[group.name]
    assert score[5] == 0 and (score > 0).sum() == 127


def test_scores_do_not_depend_on_micro_batch_sizes(tmp_path: Path) -> None:
    for family in ("vit", "resnet"):
        model = make_base(family, tmp_path)
        groups = trace_groups(model)
        whole, parts = (
            gate_fisher(model, groups, Calibration(batches_of(model, sizes))) for sizes in ([6], [1, 3, 2])
        )
        for name, score in whole.items():
            torch.testing.assert_close(parts[name], score, rtol=1e-3, atol=1e-5 * float(score.max()))


def test_gate_scoring_leaves_no_hook_and_no_gradient(tmp_path: Path) -> None:
    model = make_base("vit", tmp_path).train()
    gate_fisher(model, trace_groups(model), Calibration(batches_of(model, [2])))
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert all(p.grad is None and p.requires_grad for p in model.parameters()) and model.training


def test_missing_images_are_refused_and_layers_are_not(tmp_path: Path) -> None:
    model = make_base("vit", tmp_path)
    groups = trace_groups(model)
    with pytest.raises(RecipeError, match="no image"):
        gate_fisher(model, groups, Calibration([]))
    group = group_with(groups, "blocks.0.mlp.fc1.weight", 0)
    bare = CoupledGroup(
        "bare", group.signature, group.channels, tuple(m for m in group.members if "bias" in m.parameter)
    )
    assert gate_fisher(model, [bare], Calibration([])) == {}


def score_on(accelerator: Accelerator | None, folder: Path) -> dict[str, torch.Tensor]:
    """Score on micro-batch number k of three on rank k % world."""
    rank, world = (0, 1) if accelerator is None else (accelerator.process_index, accelerator.num_processes)
    model = make_base("vit", folder)
    batches = batches_of(model, [3, 2, 1])[rank::world]
    return gate_fisher(model, trace_groups(model), Calibration(batches, accelerator))


def save_scores(accelerator: Accelerator, folder: Path) -> None:
    save_file(score_on(accelerator, folder), folder / f"scores{accelerator.process_index}")


def test_two_ranks_score_as_one_does(tmp_path: Path) -> None:
    call_on_ranks(functools.partial(save_scores, folder=tmp_path), tmp_path / "log")
    for name, score in score_on(None, tmp_path).items():
        for rank in range(2):
            found = load_file(tmp_path / f"scores{rank}")[name]
            torch.testing.assert_close(found, score, rtol=1e-5, atol=1e-9 * float(score.max()))
