"""Networks that compute sizes in unusual ways are pruned everywhere, checked by the oracles."""

from dataclasses import replace

import pytest
import torch
from helpers.odd_networks import open_odd
from helpers.oracles import make_images, mask_error, permutation_error, prunable_share, randomize
from torch import nn

from isoprune_hf import (
    IsoPruneForImageClassification,
    PruneRecipe,
    PruningPlan,
    apply_plan,
    make_plan,
    prune_model,
    score_groups,
    trace_groups,
)
from isoprune_hf.checkpoint.modeling_isoprune import IsoPruneConfig
from isoprune_hf.models.held import HeldModel

# The trace follows all sizes in their code, so that only biases of the head and kernels along channels stay whole.
FOLLOWED = ("channel_attention", "sizes_in_configs", "split_paths")


def open_random(name: str) -> IsoPruneForImageClassification:
    model = open_odd(name).model
    randomize(model)
    return model


@pytest.mark.parametrize("name", FOLLOWED)
def test_all_weights_of_odd_network_are_prunable(name: str) -> None:
    model = open_random(name)
    groups, images = trace_groups(model), make_images(model)
    assert prunable_share(model, groups) > 0.999
    assert permutation_error(model, groups, images) <= 1e-9
    scores = score_groups(model, groups, criterion="l1")
    plan = make_plan(groups, scores, PruneRecipe(criterion="l1", ratio=0.5))
    assert mask_error(model, apply_plan(model, plan, groups), groups, plan, images) <= 1e-9


def test_sizes_in_a_shared_config_follow_the_cut() -> None:
    model = open_random("sizes_in_configs")
    plan = PruningPlan(kept={"stem": list(range(24)), "mlp.up": list(range(40))}, heads={})
    pruned = apply_plan(model, plan)
    assert pruned.config.structure is not None
    assert pruned.config.structure["attributes"][""] == {"config.widths": [24, 40], "options.last": 24}
    assert pruned.model.mlp.config is pruned.model.config
    assert model.model.config.widths == [32, 64]


class Numbered(nn.Module):
    """Reads the width of its norm as a number of positions, too."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden_size, self.norm = 8, nn.LayerNorm(8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(x) + torch.arange(self.hidden_size).float().mean()


def test_width_that_also_counts_positions_stays() -> None:
    network = nn.Sequential(nn.Flatten(2), nn.Linear(6, 8), Numbered(), nn.Linear(8, 3))
    model = HeldModel(IsoPruneConfig(image_size=[3, 2, 3]), network)
    pruned = apply_plan(model, PruningPlan(kept={"1": [0, 2, 3, 5]}, heads={})).model
    assert (pruned[2].hidden_size, pruned[2].norm.normalized_shape) == (8, (4,))


def test_kernel_along_channels_belongs_to_the_stream() -> None:
    model = open_random("channel_attention")
    groups = trace_groups(model)
    assert {group.name: group.sliding for group in groups if group.sliding} == {"stem": ("mix.weight",)}


def test_missing_tie_is_found_around_channel_attention() -> None:
    model = open_random("channel_attention")
    stream, *others = trace_groups(model)
    for lost in stream.members:
        faulty = replace(stream, members=tuple(member for member in stream.members if member is not lost))
        assert permutation_error(model, [faulty, *others], make_images(model)) > 1e-9, lost.parameter


def test_cut_along_channel_attention_is_noted() -> None:
    base = open_odd("channel_attention")
    recipe = PruneRecipe(target_macs="50%", round_to=1, criterion="l1")
    notes = prune_model(base.model, recipe).plan.notes
    assert [note for note in notes if note.startswith("approximate: 1 group") and note.endswith("stem)")]
