from pathlib import Path

import pytest
from helpers.tiny_models import FAMILIES, make_base, on_meta
from torch import nn

from isoprune_hf.errors import UnsupportedArchitectureError
from isoprune_hf.pruning.cost.macs import cost_model, count_cost
from isoprune_hf.pruning.graph.find_groups import trace_groups


def test_cost_of_small_vit_equals_sum_by_hand(tmp_path: Path) -> None:
    cost = count_cost(make_base("vit", tmp_path, labels=7))
    patches, tokens, dim, hidden = 16, 17, 32, 128
    embed = patches * dim * 3 * 4 * 4
    block = tokens * (dim * 3 * dim + dim * dim + 2 * dim * hidden) + 2 * tokens * tokens * dim
    assert cost.macs == embed + 2 * block + dim * 7
    block_params = 4 * dim + (dim + 1) * 3 * dim + (dim + 1) * dim + (dim + 1) * hidden + (hidden + 1) * dim + 2 * dim
    assert cost.params == (48 + 1) * dim + dim + tokens * dim + 2 * block_params + 2 * dim + (dim + 1) * 7


def test_published_sizes_of_the_dense_models_are_met() -> None:
    # Multiply-accumulates with both products of attention: a DeiT-B of 197 + 1 tokens has 17.6 G, a ResNet-50 4.09 G.
    deit, resnet = count_cost(on_meta("deit_base_distilled_patch16_224")), count_cost(on_meta("resnet50"))
    assert (round(deit.macs / 1e9, 2), round(deit.params / 1e6, 2)) == (17.66, 87.34)
    assert (round(resnet.macs / 1e9, 2), round(resnet.params / 1e6, 2)) == (4.09, 25.56)


@pytest.mark.parametrize("family", FAMILIES)
def test_cost_model_without_cut_is_exact(family: str, tmp_path: Path) -> None:
    model = make_base(family, tmp_path)
    groups = trace_groups(model)
    costs = cost_model(model, groups)
    assert costs.base == count_cost(model)
    assert costs.cost({}, {}) == costs.base


def test_mlp_channel_costs_its_row_and_column(tmp_path: Path) -> None:
    model = make_base("vit", tmp_path)
    costs = cost_model(model, trace_groups(model))
    after = costs.cost({"blocks.0.mlp.fc1": 1}, {})
    assert costs.base.macs - after.macs == 17 * (32 + 32)
    assert costs.base.params - after.params == 32 + 1 + 32


@pytest.mark.parametrize("family", ["resnet", "vit", "hf-convnext", "resnet-gn"])
@pytest.mark.parametrize("leaf", ["weight", "bias"])
def test_norm_wider_than_its_input_is_refused(family: str, leaf: str, tmp_path: Path) -> None:
    model = make_base(family, tmp_path)
    norms = (nn.BatchNorm2d, nn.LayerNorm, nn.GroupNorm)
    norm = next(module for module in model.model.modules() if isinstance(module, norms))
    setattr(norm, leaf, nn.Parameter(getattr(norm, leaf)[:-1].detach()))
    with pytest.raises(UnsupportedArchitectureError, match=r"does not run: a .* channels is given"):
        count_cost(model)
