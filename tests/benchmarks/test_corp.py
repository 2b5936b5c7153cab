"""CORP as a method of the accuracy benchmark: what it cuts, and its regression."""

import numpy as np
import pytest
import torch
from corp import Hidden, Moments, compensate, find_hidden, plan_of_share, with_corp
from pruned_accuracy_methods import Case, MethodError
from torch import nn

from isoprune_hf.checkpoint.modeling_isoprune import IsoPruneForImageClassification
from isoprune_hf.models import load_base
from isoprune_hf.pruning.cost.macs import count_cost
from isoprune_hf.pruning.cutting.cut import apply_plan
from isoprune_hf.pruning.graph.find_groups import trace_groups

pytestmark = pytest.mark.benchmarks

VIT = {"img_size": 16, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 2}


@pytest.fixture
def lite() -> IsoPruneForImageClassification:
    return load_base("timm/tf_efficientnet_lite0", pretrained=False, num_labels=3).model


@pytest.fixture
def vit() -> IsoPruneForImageClassification:
    return load_base("timm/vit_tiny_patch16_224", pretrained=False, model_args=VIT, num_labels=3).model


def test_expanded_channels_of_blocks_are_hidden(lite: IsoPruneForImageClassification) -> None:
    hidden = [found for group in trace_groups(lite) if (found := find_hidden(lite, group))]
    blocks = [name for name, _ in lite.model.named_modules() if name.endswith("conv_pwl")]
    assert [group.reader for group in hidden] == ["blocks.0.0.conv_pw", *blocks]


def test_second_layers_of_mlps_read_hidden_channels(vit: IsoPruneForImageClassification) -> None:
    hidden = [found for group in trace_groups(vit) if (found := find_hidden(vit, group))]
    assert [group.reader for group in hidden] == ["blocks.0.mlp.fc2", "blocks.1.mlp.fc2"]


def test_budget_is_reached_by_one_share(vit: IsoPruneForImageClassification) -> None:
    images = torch.randn(6, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    pruned, _ = with_corp(Case(vit, images, torch.zeros(6, dtype=torch.int64), 0.7, 0))
    widths = {pruned.model.get_submodule(f"blocks.{block}.mlp.fc2").in_features for block in range(2)}
    assert len(widths) == 1
    share = count_cost(pruned).macs / count_cost(vit).macs
    assert 0.68 < share <= 0.7
    with pytest.raises(MethodError):
        with_corp(Case(vit, images, torch.zeros(6, dtype=torch.int64), 0.1, 0))


def test_channels_with_least_square_are_removed() -> None:
    moments = Moments(torch.tensor([2.0, 0.0, 1.0, 0.5]), torch.diag(torch.tensor([0.1, 3.0, 0.5, 0.5])))
    plan = plan_of_share([Hidden("hidden", "reader", torch.arange(4))], {"reader": moments}, 0.5)
    assert plan.kept == {"hidden": (0, 1)}  # E[x^2] is 4.1, 3, 1.5 and 0.75


def test_compensation_is_the_regression_of_numpy(vit: IsoPruneForImageClassification) -> None:
    groups = trace_groups(vit)
    hidden = next(found for group in groups if (found := find_hidden(vit, group)))
    generator = np.random.default_rng(0)
    rows = generator.normal(size=(500, 96)) @ generator.normal(size=(96, 96))
    rows[:, 90:] = rows[:, :6] * 2 + 1  # affine functions of kept channels
    moments = Moments(torch.from_numpy(rows.mean(0)), torch.from_numpy(np.cov(rows.T, bias=True)))
    plan = plan_of_share([hidden], {hidden.reader: moments}, 0.0)
    kept = tuple(range(90))
    pruned = apply_plan(vit, type(plan)(kept={hidden.name: kept}, heads={}), groups)
    compensate(vit, pruned, hidden, torch.tensor(kept), moments)
    dense, cut = (model.model.get_submodule(hidden.reader) for model in (vit, pruned))
    assert isinstance(dense, nn.Linear) and isinstance(cut, nn.Linear)
    x = torch.from_numpy(rows).float()
    centred = rows[:, :90] - rows[:, :90].mean(0)
    matrix = centred.T @ centred / 500
    weights = np.linalg.inv(matrix + 1e-3 * matrix.diagonal().mean() * np.eye(90)) @ (centred.T @ rows[:, 90:] / 500)
    predicted = torch.from_numpy(centred @ weights + rows[:, 90:].mean(0)).float()
    expected = dense(torch.cat([x[:, :90], predicted], dim=1))
    assert torch.allclose(cut(x[:, :90]), expected, atol=1e-3)


def test_copies_of_channels_cost_nothing(lite: IsoPruneForImageClassification) -> None:
    block = lite.model.get_submodule("blocks.1.0")
    with torch.no_grad():
        for name in ("conv_pw.weight", "bn1.weight", "bn1.bias", "conv_dw.weight", "bn2.weight", "bn2.bias"):
            block.get_parameter(name)[1] = block.get_parameter(name)[0]
    groups = trace_groups(lite)
    hidden = next(found for group in groups if (found := find_hidden(lite, group)) and "1.0" in found.reader)
    moments = Moments(torch.zeros(96), torch.eye(96))
    moments.covariance[0, 1] = moments.covariance[1, 0] = 1.0
    moments = Moments(*(values.double() for values in moments))
    kept = torch.cat([torch.tensor([0]), torch.arange(2, 96)])
    plan = plan_of_share([hidden], {hidden.reader: moments}, 0.0)
    pruned = apply_plan(lite, type(plan)(kept={hidden.name: tuple(kept.tolist())}, heads={}), groups)
    compensate(lite, pruned, hidden, kept, moments)
    images = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        wanted, found = (model.eval()(pixel_values=images).logits for model in (lite, pruned))
    assert torch.allclose(wanted, found, atol=1e-3 * float(wanted.abs().max()))
