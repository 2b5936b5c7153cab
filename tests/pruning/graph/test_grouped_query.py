"""Grouped-query attention: query heads that share a head of keys and values are removed together with it."""

import numpy as np
import pytest
import torch
from helpers.grouped_query import make_model
from helpers.masking import masked_base, plan_random
from helpers.traced_models import shuffle

from isoprune_hf.pruning.cost.macs import count_cost
from isoprune_hf.pruning.cutting.cut import apply_plan
from isoprune_hf.pruning.graph.find_groups import trace_groups


def make_images() -> torch.Tensor:
    return torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def test_channel_has_dims_of_all_sharing_query_heads() -> None:
    group = next(group for group in trace_groups(make_model()) if group.name == "blocks.1.attn")
    assert (group.channels, group.num_heads, group.head_dim) == (8, 2, 4)
    members = {(m.parameter.removeprefix("blocks.1.attn."), m.dim): m.index for m in group.members}
    # Key head 1, dim 2 is channel 6; its queries are heads 3, 4 and 5, so rows 12 + 2, 16 + 2 and 20 + 2.
    assert members["q_proj.weight", 0][6].tolist() == [14, 18, 22]
    assert members["q_proj.bias", 0][6].tolist() == [14, 18, 22]
    assert members["proj.weight", 1][6].tolist() == [14, 18, 22]
    assert members["q_proj.weight", 0][1].tolist() == [1, 5, 9]
    for name in ("k_proj.weight", "v_proj.weight", "v_proj.bias"):
        assert members[name, 0].tolist() == [[channel] for channel in range(8)]
    assert len(members) == 6


def test_shuffling_heads_and_dims_keeps_the_output() -> None:
    model = make_model()
    with torch.no_grad():
        expected, found = model(make_images()).logits, shuffle(model)(make_images()).logits
    assert (found - expected).abs().max() <= 1e-9 * expected.abs().max()


@pytest.mark.parametrize("keys", [1, 2, 3, 6])
def test_cut_equals_base_with_removed_elements_zeroed(keys: int) -> None:
    model = make_model(num_kv_heads=keys)
    groups, plan = plan_random(model, head_ratio=0.4, head_dim_ratio=0.3)
    pruned = apply_plan(model, plan, groups)
    with torch.no_grad():
        expected = masked_base(model, groups, plan)(make_images()).logits
        found, dense = pruned(make_images()).logits, model(make_images()).logits
    assert (found - expected).abs().max() <= 1e-9 * expected.abs().max()
    assert (found - dense).abs().max() > 1e-2 * dense.abs().max()
    assert count_cost(pruned).to_dict() == plan.achieved["pruned"]


@pytest.mark.parametrize("head_ratio", [0.0, 0.5, 1.0])
def test_head_counts_keep_their_ratio(head_ratio: float) -> None:
    groups, plan = plan_random(make_model(), head_ratio=head_ratio, head_dim_ratio=0.5, max_ratio=1.0)
    pruned = apply_plan(make_model(), plan, groups)
    kept = []
    for group in (group for group in groups if group.num_heads):
        attention, heads = pruned.model.get_submodule(group.name), len(plan.heads[group.name])
        dims = len(plan.kept[group.name]) // heads
        assert (attention.num_kv_heads, attention.num_heads, attention.num_kv_groups) == (heads, 3 * heads, 3)
        assert (attention.kv_dim, attention.attn_dim) == (heads * dims, 3 * heads * dims)
        assert (attention.head_dim, attention.scale) == (dims, dims**-0.5)
        assert attention.q_proj.out_features == attention.proj.in_features == attention.attn_dim
        assert attention.k_proj.out_features == attention.v_proj.out_features == attention.kv_dim
        assert np.isfinite(pruned(make_images()).logits.detach()).all()
        kept.append(heads)
    assert sum(kept) == {0.0: 4, 0.5: 2, 1.0: 2}[head_ratio] and min(kept) >= 1
