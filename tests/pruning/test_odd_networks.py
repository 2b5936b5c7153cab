"""Networks that each do one unusual thing go through every criterion, repair and rotation.

`helpers/odd_networks.py` defines them. A group that a step cannot handle is left as it is; no step refuses or damages
the network.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.odd_networks import calibration_batches, open_odd

from isoprune_hf import PruneRecipe, load_base, prune_model

# Networks that every combination handles.
HANDLED = (
    "auxiliary_head",
    "auxiliary_norm",
    "bare_tokens",
    "buffers_in_attention",
    "caches_bias",
    "channel_attention",
    "dead_branch",
    "dict_output",
    "expert_of_image",
    "group_norm_per_channel",
    "huge_weight",
    "idle_experts",
    "keeps_maps",
    "keyword_calls",
    "one_block_class_token",
    "one_channel",
    "other_keys_and_values",
    "pads_by_itself",
    "recurrent",
    "reused",
    "rotary_frequencies",
    "rotary_table",
    "selected_experts",
    "shared_parameter",
    "six_channels",
    "sizes_by_numel",
    "sizes_in_configs",
    "split_paths",
    "token_mixer",
    "tuple_output",
    "two_names",
    "values_in_constructor",
    "writes_in_place",
    "zero_scale",
)
COMBINATIONS = {
    "best": PruneRecipe(target_macs="50%", round_to=1),
    "taylor": PruneRecipe(target_macs="50%", round_to=1, criterion="taylor"),
    "hessian_bn": PruneRecipe(target_macs="50%", round_to=1, criterion="hessian", reconstruct="bn"),
    "variance_bias": PruneRecipe(target_macs="50%", round_to=1, criterion="activation_variance", reconstruct="bias"),
    "l1_least_squares": PruneRecipe(
        target_macs="50%", round_to=1, criterion="l1", reconstruct="least_squares", rotate=True
    ),
    "fisher_class": PruneRecipe(target_macs="50%", round_to=1, criterion="gate_fisher", allocation="class"),
}


def cases() -> Iterator[Any]:
    """Yield each network with each combination; "best" is run by default, and of every sixth network another one.

    `make test-all` runs every fourth of the others, `make test-faults` the rest.
    """
    _, *others = COMBINATIONS
    for number, name in enumerate(HANDLED):
        by_default = ("best", *([] if number % 6 else [others[number // 6 % len(others)]]))
        for index, combination in enumerate(COMBINATIONS):
            is_rare = (number + index) % 4
            marks = () if combination in by_default else pytest.mark.faults if is_rare else pytest.mark.families
            yield pytest.param(name, combination, marks=marks)


@pytest.mark.parametrize(("name", "combination"), cases())
def test_odd_network_is_pruned_saved_and_trained(name: str, combination: str, tmp_path: Path) -> None:
    base = open_odd(name)
    before = {key: value.clone() for key, value in base.model.state_dict().items()}
    channels = base.model.config.image_size[0]
    result = prune_model(base.model, COMBINATIONS[combination], calibration_batches(channels))

    after = base.model.state_dict()
    assert before.keys() == after.keys()
    assert [key for key, value in before.items() if not torch.equal(value, after[key])] == []
    floats = {key: value for key, value in result.model.state_dict().items() if value.is_floating_point()}
    assert [key for key, value in floats.items() if not value.isfinite().all()] == []
    assert result.pruned_cost.macs <= result.base_cost.macs / 2

    images = calibration_batches(channels, seed=5)[0][0]
    with torch.no_grad():
        logits = result.model(images).logits
    result.save(tmp_path / "pruned", base.processor)
    again = load_base(str(tmp_path / "pruned")).model
    with torch.no_grad():
        assert torch.equal(again(images).logits, logits)

    result.model.train()
    labels = torch.zeros(len(images), dtype=torch.long)
    result.model(images, labels=labels).loss.backward()
