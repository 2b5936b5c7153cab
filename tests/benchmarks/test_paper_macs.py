"""The counter of published tables, compared with torch-pruning and with counts by hand."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers.tiny_models import FAMILIES, make_base, on_meta
from paper_macs import paper_macs
from torch_pruning.utils.op_counter import count_ops_and_params

from isoprune_hf.pruning.cost.macs import count_cost
from isoprune_hf.pruning.prune import prune_model
from isoprune_hf.recipes import PruneRecipe

pytestmark = pytest.mark.benchmarks

RECIPE = PruneRecipe(criterion="l1", ratio=0.4, head_ratio=0.25, head_dim_ratio=0.5, round_to=1)


@pytest.mark.parametrize("family", FAMILIES)
def test_count_equals_that_of_torch_pruning(family: str, tmp_path: Path) -> None:
    dense = make_base(family, tmp_path)
    recipe = replace(RECIPE, head_ratio=0.0) if "swin" in family else RECIPE
    counts = []
    for model in (dense, prune_model(dense, recipe).model):
        image = torch.zeros(1, *model.config.image_size)
        counts.append(paper_macs(model))
        assert counts[-1] == count_ops_and_params(model.model, image)[0]
    assert counts[1] < counts[0]


def test_dense_models_have_their_published_macs() -> None:
    # From the paper: DeiT-S 4.64, DeiT-T 1.27, ResNet-101 7.85.
    names = ("deit_small_distilled_patch16_224", "deit_tiny_distilled_patch16_224", "resnet101")
    assert [round(paper_macs(on_meta(name)) / 1e9, 2) for name in names] == [4.64, 1.27, 7.85]


def test_projection_after_narrow_attention_is_undercounted(tmp_path: Path) -> None:
    model = make_base("vit", tmp_path)
    recipe = PruneRecipe(criterion="l1", ratio=0.0, head_dim_ratio=0.5, round_to=1)
    dense, pruned = (
        paper_macs(model) - count_cost(model).macs,
        paper_macs(narrow := prune_model(model, recipe).model) - count_cost(narrow).macs,
    )
    # Two blocks of 17 tokens; 32 channels, of which attention keeps 16. By hand, per token: the biases and the scale
    # of the query (3 + 1 + 1 times the width of attention), and 16 x (32 - 16) missing products of the projection.
    assert dense - pruned == 2 * 17 * (5 * 16 + 16 * 16)


def test_larger_image_has_more_macs(tmp_path: Path) -> None:
    model = make_base("resnet", tmp_path)
    twice = [3, 128, 128]
    assert paper_macs(model, twice) == count_ops_and_params(model.model, torch.zeros(1, *twice))[0]


def test_counting_does_not_change_the_model(tmp_path: Path) -> None:
    model = make_base("deit", tmp_path).train()
    paper_macs(model)
    assert all(module.training and not module._forward_hooks for module in model.modules())
