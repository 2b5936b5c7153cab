"""Networks that decide by values what runs: a check repeats the decisions, and idle modules stay whole."""

import pytest
import torch
from helpers.odd_networks import calibration_batches, open_odd

from isoprune_hf import PruneRecipe, prune_model
from isoprune_hf.pruning.graph.decisions import Replay, deciding_tensors
from isoprune_hf.pruning.graph.find_groups import trace_groups
from isoprune_hf.pruning.graph.torch_private import aten
from isoprune_hf.pruning.graph.trace import Decision

HALF = PruneRecipe(criterion="l1", target_macs="50%", round_to=1, max_ratio=1.0)


def test_deciding_tensors_are_masks_and_read_values() -> None:
    x, mask = torch.ones(2, 3), torch.tensor([True, False])
    assert deciding_tensors(aten.nonzero.default, (mask,))[0] is mask
    assert deciding_tensors(aten._local_scalar_dense.default, (mask,))[0] is mask
    assert deciding_tensors(aten.masked_select.default, (x, mask))[0] is mask
    assert deciding_tensors(aten.index.Tensor, (x, [None, mask]))[0] is mask
    assert deciding_tensors(aten.index.Tensor, (x, [torch.tensor([0])])) == []
    assert deciding_tensors(aten.add.Tensor, (x, x)) == []


def test_replay_repeats_numbers_and_masks() -> None:
    x, mask, other = torch.ones(2, 3), torch.tensor([True, False]), torch.tensor([True, True])
    replay = Replay([Decision("", ()), Decision("", (7,)), Decision("", (mask,)), Decision("", (mask,))])
    assert replay.run(aten._local_scalar_dense.default, (x,)) == ((x,), 7)
    (_, indices), out = replay.run(aten.index.Tensor, (x, [other, None]))
    assert out is None and indices[0] is mask and indices[1] is None
    assert replay.run(aten.masked_select.default, (x, other))[0][1] is mask
    assert replay.run(aten.masked_select.default, (x, other))[0][1] is other  # there is no further decision


@pytest.mark.parametrize(
    ("name", "is_whole", "modules"),
    [("selected_experts", False, {"blocks.1"}), ("idle_experts", True, {"blocks.2"}), ("expert_of_image", True, {""})],
)
def test_experts_that_may_run_fit_the_others(name: str, is_whole: bool, modules: set[str]) -> None:
    base = open_odd(name)
    groups = trace_groups(base.model)
    assert {decision.module for decision in groups.graph.trace.decisions} == modules
    assert any(".experts." in f".{group.name}" for group in groups) != is_whole
    result = prune_model(base.model, HALF)
    assert any("decides by values" in note and "experts" in note for note in result.plan.notes) == is_whole
    model = result.model.model
    experts = (
        model.blocks[2] if name == "idle_experts" else model.blocks[1] if name == "selected_experts" else model
    ).experts
    x = torch.randn(2, 32, 8, 8) if name == "expert_of_image" else torch.randn(5, 32)
    assert all(expert(x).shape == x.shape for expert in experts)  # also those that no token selected


def test_layers_on_selected_rows_are_left_as_cut() -> None:
    base = open_odd("selected_experts")
    recipe = PruneRecipe(criterion="l1", target_macs="50%", round_to=1, reconstruct="least_squares")
    result = prune_model(base.model, recipe, calibration_batches(3))
    (note,) = [note for note in result.plan.notes if "left as cut by prune.reconstruct" in note]
    assert "9 layers" in note and "selects by values" in note and "blocks.1.gate" in note
