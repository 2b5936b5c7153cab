from pathlib import Path
from typing import get_args

import numpy as np
import pytest
import torch
from helpers.marks import one_of_each
from helpers.plain_scores import assert_near, batches_of, channel_scores, gradients_of_images
from helpers.tiny_models import make_base, make_images
from torch import nn

from isoprune_hf.errors import RecipeError
from isoprune_hf.pruning.graph.find_groups import trace_groups
from isoprune_hf.pruning.groups import ResidualBlock
from isoprune_hf.pruning.scoring.criteria.registry import CRITERIA
from isoprune_hf.pruning.scoring.score_groups import score_groups
from isoprune_hf.recipes import DATA_CRITERIA, Criterion
from isoprune_hf.recipes.presets import LOSS_CRITERIA

SIZES = [3, 1, 2]
NORMS = {"taylor_l2": "member", "l2": "channel"}
ELEMENTWISE = ["taylor", "taylor_l2", "hessian", "hessian_reference", "l1", "l2"]


class Case:
    """A tiny base with its groups, batches, and the gradients of each image."""

    def __init__(self, family: str, folder: Path):
        self.model = make_base(family, folder)
        self.groups = {group.name: group for group in trace_groups(self.model)}
        self.batches = batches_of(self.model, SIZES)
        self.weights = {name: p.detach().clone() for name, p in self.model.model.named_parameters()}
        self.gradients = list(gradients_of_images(self.model, self.batches))

    def values(self, criterion: str) -> dict[str, torch.Tensor]:
        each = {name: torch.stack([g[name].double() for g in self.gradients]) for name in self.weights}
        measured = {
            "taylor": lambda g, w: w * g.mean(0),
            "taylor_l2": lambda g, w: w * g.mean(0),
            "hessian": lambda g, w: w**2 * (g**2).mean(0),
            "hessian_reference": lambda g, w: w**2 * g[-1] ** 2,
            "l1": lambda g, w: w,
            "l2": lambda g, w: w,
        }[criterion]
        return {name: measured(each[name], weight) for name, weight in self.weights.items()}

    def score(self, criterion: str, **options) -> "torch.Tensor":
        groups = tuple(self.groups.values())
        return score_groups(self.model, groups, criterion=criterion, batches=iter(self.batches), **options)


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory):
    made: dict[str, Case] = {}

    def give(family: str) -> Case:
        if family not in made:
            made[family] = Case(family, tmp_path_factory.mktemp("base"))
        return made[family]

    return give


def block_of(case: Case, name: str) -> ResidualBlock:
    return ResidualBlock(name, "block", tuple(p for p in case.weights if p.startswith(f"{name}.")))


def test_recipes_and_registry_name_the_same_criteria() -> None:
    assert set(CRITERIA) == set(get_args(Criterion))
    assert {name for name, criterion in CRITERIA.items() if criterion.reads_images} == set(DATA_CRITERIA)
    assert {name for name, criterion in CRITERIA.items() if criterion.in_loss_units} == set(LOSS_CRITERIA)


@pytest.mark.parametrize("family", one_of_each(["vit", "swin", "resnet", "convnext", "mobilenet_v2"], "vit"))
@pytest.mark.parametrize("criterion", ELEMENTWISE)
def test_elements_are_reduced_by_the_documented_formulas(criterion: str, family: str, case) -> None:
    case = case(family)
    values, norm = case.values(criterion), NORMS.get(criterion, "sum")
    for reduction in ("sum", "mean"):
        scores = case.score(criterion, reduction=reduction).scores
        assert set(scores) == set(case.groups)
        for name, group in case.groups.items():
            expected = channel_scores(group, values, norm, reduction)
            assert_near(scores[name], expected, 2e-5, 0.0, f"{name} {reduction}")


@pytest.mark.parametrize("criterion", ELEMENTWISE)
def test_batchnorm_can_be_left_out(criterion: str, case) -> None:
    case = case("resnet")
    norms = [name for name, module in case.model.model.named_modules() if isinstance(module, nn.BatchNorm2d)]
    values = {n: v for n, v in case.values(criterion).items() if n.rpartition(".")[0] not in norms}
    assert len(values) == len(case.weights) - 2 * len(norms)
    for reduction in ("sum", "mean"):
        result = case.score(criterion, reduction=reduction, score_batchnorm=False)
        assert not result.score_batchnorm
        for name, group in case.groups.items():
            expected = channel_scores(group, values, NORMS.get(criterion, "sum"), reduction)
            assert_near(result.scores[name], expected, 2e-5, 0.0, name)


def test_bn_scale_sums_all_norms_of_a_channel(case) -> None:
    case = case("mobilenet_v2")
    scores = case.score("bn_scale").scores["features.2.conv.0.0"]
    expanded, depthwise = (case.weights[f"features.2.conv.{n}.1.weight"] for n in (0, 1))
    torch.testing.assert_close(scores, expanded.abs() + depthwise.abs())
    mean = case.score("bn_scale", reduction="mean").scores["features.2.conv.0.0"]
    torch.testing.assert_close(mean, (expanded.abs() + depthwise.abs()) / 2)


def test_bn_scale_without_batchnorm_is_refused(case) -> None:
    with pytest.raises(RecipeError, match=r"bn_scale .*patch_embed\.proj"):
        case("vit").score("bn_scale")
    with pytest.raises(RecipeError, match=r"prune\.score_batchnorm"):
        case("resnet").score("bn_scale", score_batchnorm=False)


def plain_distances(filters: torch.Tensor) -> torch.Tensor:
    return torch.stack([torch.stack([(one - other).norm() for other in filters]).sum() for one in filters])


def test_fpgm_is_distance_between_filters_that_write_channels(case) -> None:
    resnet, vit, mobile = case("resnet"), case("vit"), case("mobilenet_v2")
    found = resnet.score("fpgm").scores["layer1.0.conv2"]
    torch.testing.assert_close(found, plain_distances(resnet.weights["layer1.0.conv2.weight"].flatten(1)))
    found = mobile.score("fpgm", reduction="mean").scores["features.2.conv.0.0"]
    parts = [plain_distances(mobile.weights[f"features.2.conv.{n}.0.weight"].flatten(1)) for n in (0, 1)]
    torch.testing.assert_close(found, (parts[0] + parts[1]) / 2)
    query, key, value = vit.weights["blocks.0.attn.qkv.weight"].chunk(3)
    found = vit.score("fpgm").scores["blocks.0.attn"]
    torch.testing.assert_close(found, plain_distances(torch.cat([query, key, value], dim=1)))


@pytest.mark.parametrize("family", ["vit", "resnet"])
def test_lamp_is_share_among_channels_not_smaller(family: str, case) -> None:
    case = case(family)
    scores = case.score("lamp").scores
    for name, group in case.groups.items():
        squares = channel_scores(group, case.weights, "channel").double() ** 2
        expected = torch.stack([square / squares[squares >= square].sum() for square in squares])
        torch.testing.assert_close(scores[name], expected.float())
        assert scores[name].max() == 1


def test_lamp_of_zero_channels_is_zero(tmp_path: Path) -> None:
    model = make_base("vit", tmp_path)
    for parameter in model.model.blocks[0].mlp.parameters():
        parameter.data.zero_()
    scores = score_groups(model, trace_groups(model), criterion="lamp").scores["blocks.0.mlp.fc1"]
    assert torch.equal(scores, torch.zeros(128))


def outputs_of(case: Case, modules: list[str]) -> dict[str, torch.Tensor]:
    outputs: dict[str, torch.Tensor] = {}
    handles = [
        case.model.model.get_submodule(name).register_forward_hook(
            lambda module, args, output, name=name: outputs.__setitem__(name, output.double().clone())
        )
        for name in modules
    ]
    with torch.no_grad():
        case.model.eval()(pixel_values=torch.cat([images for images, _ in case.batches]))
    for handle in handles:
        handle.remove()
    return outputs


# Group -> the outputs that the next layers read, the dim of the channels there, and how often each channel is there.
READ = {
    "vit": ("blocks.0.mlp.fc1", ["blocks.0.mlp.act"], -1, 1),
    "vit stream": (
        "patch_embed.proj",
        [f"blocks.{n}.norm{m}" for n in (0, 1) for m in (1, 2)] + ["norm"],
        -1,
        1,
    ),
    "swin": ("layers.0.blocks.1.mlp.fc1", ["layers.0.blocks.1.mlp.act"], -1, 1),
    "convnext": ("stages.1.blocks.0.mlp.fc1", ["stages.1.blocks.0.mlp.act"], -1, 1),
    "resnet": ("layer1.0.conv1", ["layer1.0.act1"], 1, 1),
    "resnext": ("layer2.0.conv1", ["layer2.0.act1"], 1, 4),
    "mobilenet_v2": ("features.2.conv.0.0", ["features.2.conv.0", "features.2.conv.1"], 1, 1),
}


@pytest.mark.parametrize("kind", READ)
def test_variance_is_of_inputs_of_the_next_layers(kind: str, case) -> None:
    name, modules, dim, copies = READ[kind]
    case = case(kind.partition(" ")[0])
    outputs = outputs_of(case, modules)
    if kind == "vit stream":  # the head reads the class token alone
        outputs["norm"] = outputs["norm"][:, :1]
    flat = [outputs[module].movedim(dim, -1).flatten(0, -2) for module in modules]
    parts = [output.var(dim=0, unbiased=False).reshape(copies, -1).sum(0) for output in flat]
    for reduction, divisor in (("sum", 1), ("mean", len(parts))):
        found = case.score("activation_variance", reduction=reduction).scores[name]
        torch.testing.assert_close(found, (sum(parts) / divisor).float(), rtol=1e-5, atol=1e-9)


def test_variance_of_attention_is_at_its_output_projection(case) -> None:
    case = case("vit")
    attention = case.model.model.blocks[0].attn
    with torch.no_grad():
        stem = case.model.model.eval()
        images = torch.cat([images for images, _ in case.batches])
        hidden = stem.blocks[0].norm1(stem.norm_pre(stem._pos_embed(stem.patch_embed(images))))
        query, key, value = attention.qkv(hidden).unflatten(2, (3, 4, 8)).permute(2, 0, 3, 1, 4)
        mixed = (query @ key.mT * 8**-0.5).softmax(-1) @ value
        expected = mixed.transpose(1, 2).flatten(2).flatten(0, 1).double().var(dim=0, unbiased=False)
    found = case.score("activation_variance").scores["blocks.0.attn"]
    torch.testing.assert_close(found, expected.float(), rtol=1e-4, atol=1e-9)


def test_four_copies_in_patch_merging_add_up(case) -> None:
    case = case("swin")
    norm = outputs_of(case, ["layers.1.downsample.norm"])["layers.1.downsample.norm"].flatten(0, -2)
    stream = [f"layers.0.blocks.{n}.norm{m}" for n in (0, 1) for m in (1, 2)]
    parts = [output.flatten(0, -2).var(0, unbiased=False) for output in outputs_of(case, stream[1::2]).values()]
    # Before attention the stream is shifted and cut into windows, which moves no channel.
    parts += [output.flatten(0, -2).var(0, unbiased=False) for output in outputs_of(case, stream[::2]).values()]
    expected = sum(parts) + norm.var(0, unbiased=False).reshape(4, -1).sum(0)
    found = case.score("activation_variance").scores["patch_embed.proj"]
    torch.testing.assert_close(found, expected.float(), rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("criterion", ["taylor", "taylor_l2", "hessian", "l1", "l2"])
def test_block_score_is_mean_of_its_elements(criterion: str, case) -> None:
    case = case("convnext")
    block = block_of(case, "stages.1.blocks.0")
    values = torch.cat([case.values(criterion)[name].flatten() for name in block.parameters]).abs().double()
    expected = values.mean() if criterion not in NORMS else values.square().mean().sqrt()
    result = case.score(criterion, blocks=[block])
    assert result.blocks == {"stages.1.blocks.0": pytest.approx(expected.item(), rel=1e-5)}


def test_block_bn_scale_is_mean_of_its_norms(case) -> None:
    case = case("resnet")
    block = block_of(case, "layer1.0")
    scales = [case.weights[f"layer1.0.{n}.weight"].abs() for n in ("bn1", "bn2", "bn3", "downsample.1")]
    found = case.score("bn_scale", blocks=[block]).blocks["layer1.0"]
    assert found == pytest.approx(torch.cat(scales).mean().item(), rel=1e-6)


@pytest.mark.parametrize("criterion", ["fpgm", "lamp", "activation_variance"])
def test_block_score_is_mean_of_channels_inside(criterion: str, case) -> None:
    case = case("resnet")
    result = case.score(criterion, blocks=[block_of(case, "layer2.0"), block_of(case, "layer2.0.bn3")])
    inside = torch.cat([result.scores["layer2.0.conv1"], result.scores["layer2.0.conv2"]])
    assert result.blocks["layer2.0"] == pytest.approx(inside.mean().item(), rel=1e-6)
    reaching = result.scores["layer2.0.conv3"]  # nothing lies wholly inside this one
    assert result.blocks["layer2.0.bn3"] == pytest.approx(reaching.mean().item(), rel=1e-6)


@pytest.mark.parametrize("criterion", sorted(CRITERIA.keys() - {"random"}))
def test_block_without_scored_parameters_has_no_score(criterion: str, case) -> None:
    case = case("resnet")
    scored, empty = block_of(case, "layer1.0"), ResidualBlock("empty", "block", ())
    found, alone = (case.score(criterion, blocks=blocks) for blocks in ([empty, scored], [scored]))
    assert found.blocks == alone.blocks and alone.blocks.keys() == {"layer1.0"}
    assert found.unscored.keys() == {"empty"}


def test_random_block_scores_do_not_change_group_scores(case) -> None:
    case = case("vit")
    blocks = [block_of(case, "blocks.0"), block_of(case, "blocks.1")]
    plain, first, again = (case.score("random", seed=4, blocks=chosen) for chosen in ((), blocks, blocks))
    assert all(torch.equal(plain.scores[name], first.scores[name]) for name in plain.scores)
    assert first.blocks == again.blocks and len(set(first.blocks.values())) == 2


@pytest.mark.parametrize("family", one_of_each(["vit", "resnet"], "vit"))
@pytest.mark.parametrize("criterion", CRITERIA)
def test_scoring_restores_model_and_random_state(criterion: str, family: str, tmp_path: Path) -> None:
    model = make_base(family, tmp_path).train()
    frozen = next(iter(model.model.parameters())).requires_grad_(False)
    graded = list(model.model.parameters())[-1]
    graded.grad = torch.ones_like(graded)
    next(module for module in model.modules() if isinstance(module, (nn.LayerNorm, nn.BatchNorm2d))).eval()
    batches = [(make_images(model), torch.tensor([1, 2]))]
    tensors = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    modes = [module.training for module in model.modules()]
    hooks = [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()]
    torch_state, numpy_state = torch.get_rng_state(), np.random.get_state()[1].copy()
    precision = "bf16" if criterion in DATA_CRITERIA else "no"
    options = {"batches": batches, "precision": precision}
    if criterion == "bn_scale" and family == "vit":
        with pytest.raises(RecipeError):
            score_groups(model, trace_groups(model), criterion=criterion, **options)
    else:
        score_groups(model, trace_groups(model), criterion=criterion, **options)
    assert modes == [module.training for module in model.modules()]
    assert hooks == [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()]
    assert not frozen.requires_grad and sum(not p.requires_grad for p in model.parameters()) == 1
    assert torch.equal(graded.grad, torch.ones_like(graded))
    assert sum(p.grad is not None for p in model.parameters()) == 1
    assert all(torch.equal(tensor, tensors[name]) for name, tensor in model.state_dict().items())
    assert torch.equal(torch_state, torch.get_rng_state())
    assert np.array_equal(numpy_state, np.random.get_state()[1])
