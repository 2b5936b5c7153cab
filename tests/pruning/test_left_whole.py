"""Parts that a step of a pruning leaves as they are: each is named in a note, and the others are handled."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers.marks import one_of_each
from helpers.odd_networks import calibration_batches, open_odd
from helpers.plain_scores import batches_of
from helpers.tiny_models import make_base
from torch import nn

from isoprune_hf import PruneRecipe, find_blocks, make_plan, prune_model, score_groups, trace_groups
from isoprune_hf.errors import RecipeError
from isoprune_hf.pruning import pipeline
from isoprune_hf.pruning.groups import ResidualBlock
from isoprune_hf.pruning.plan import note_left
from isoprune_hf.pruning.scoring.scores import ImportanceScores

CRITERIA = ["gate_fisher", "gate_fisher_joint", "taylor", "hessian", "activation_variance"]


def test_note_counts_parts_by_reason() -> None:
    reasons = {"they are odd": ["a", "b", "c", "d"], "it is even": ["e"]}
    assert note_left("left whole", "group", reasons) == (
        "left whole: 5 groups (4: they are odd: a, b, c, ...; 1: it is even: e)",
    )
    assert note_left("left whole", "group", {"it is even": ["e"]}) == ("left whole: 1 group (1: it is even: e)",)
    assert note_left("left whole", "group", {}) == ()


@pytest.mark.parametrize("criterion", one_of_each(CRITERIA, "gate_fisher", "hessian"))
def test_group_with_scores_not_finite_stays_whole(criterion: str) -> None:
    base = open_odd("hidden_overflow")
    recipe = PruneRecipe(criterion=criterion, ratio=0.5, round_to=1, reconstruct="least_squares")
    result = prune_model(base.model, recipe, calibration_batches(3))
    assert result.plan.kept and "up" not in result.plan.kept
    assert result.scores.unscored["up"] == "finite scores"
    assert any(note.startswith("left whole: ") and "no finite scores" in note for note in result.plan.notes)
    assert any(note.startswith("left as cut by prune.reconstruct: ") and "down" in note for note in result.plan.notes)
    with torch.no_grad():
        assert result.model(calibration_batches(3)[0][0]).logits.isfinite().all()
    assert [line for line in repr(result).splitlines() if line.startswith("left whole: ")]


def test_base_with_logits_not_finite_is_refused_first(monkeypatch: pytest.MonkeyPatch) -> None:
    model = open_odd("reused").model
    nn.init.constant_(model.model.head.bias, float("nan"))
    monkeypatch.setattr(pipeline, "score_with_recipe", None)  # not reached
    for recipe in (PruneRecipe(target_macs="50%"), PruneRecipe(target_macs="50%", criterion="taylor")):
        with pytest.raises(RecipeError) as caught:
            prune_model(model, recipe, calibration_batches(3))
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("criterion", ["l1", "lamp", "bn_scale", "fpgm"])
def test_scores_that_rank_nothing_are_refused(criterion: str) -> None:
    model = open_odd("reused").model
    for parameter in model.parameters():
        nn.init.ones_(parameter)
    with pytest.raises(RecipeError, match=criterion):
        score_groups(model, trace_groups(model), criterion=criterion)


@pytest.mark.parametrize("criterion", ["taylor", "gate_fisher", "gate_fisher_joint", "hessian"])
def test_gradients_that_are_all_zero_are_refused(criterion: str) -> None:
    model = open_odd("reused").model
    nn.init.zeros_(model.model.head.weight)  # no channel has any effect on the logits
    with pytest.raises(RecipeError, match=criterion):
        score_groups(model, trace_groups(model), criterion=criterion, batches=calibration_batches(3))


def scored_without(name: str, folder: Path) -> tuple[tuple[ResidualBlock, ...], ImportanceScores, list]:
    model = make_base("vit", folder)
    groups, blocks = trace_groups(model), find_blocks(model)
    scores = score_groups(model, groups, criterion="l1", blocks=blocks)
    return (
        blocks,
        ImportanceScores(scores.scores, "l1", "", {}, {k: v for k, v in scores.blocks.items() if k != name}),
        groups,
    )


@pytest.mark.parametrize("name", ["blocks.0", "blocks.1"])
def test_block_without_a_score_stays(name: str, tmp_path: Path) -> None:
    blocks, scores, groups = scored_without(name, tmp_path)
    other = {"blocks.0": "blocks.1", "blocks.1": "blocks.0"}[name]
    recipe = PruneRecipe(criterion="l1", remove_blocks=1, round_to=1)
    plan = make_plan(groups, scores, recipe, blocks=blocks)
    assert plan.removed_blocks == (other,)
    assert f"left whole: 1 block (1: l1 finds no value to score: {name})" in plan.notes
    with pytest.raises(RecipeError, match="remove_blocks"):
        make_plan(groups, scores, PruneRecipe(criterion="l1", remove_blocks=2), blocks=blocks)
    named = make_plan(groups, scores, PruneRecipe(criterion="l1", remove_blocks=[name]), blocks=blocks)
    assert named.removed_blocks == (name,)


def test_uniform_layout_leaves_the_tied_groups_whole(tmp_path: Path) -> None:
    model = make_base("vit", tmp_path)
    groups = trace_groups(model)
    scores = score_groups(model, groups, criterion="l1")
    fewer = {name: score for name, score in scores.scores.items() if name != "blocks.1.mlp.fc1"}
    recipe = PruneRecipe(criterion="l1", layout="uniform", round_to=1)
    plan = make_plan(groups, replace(scores, scores=fewer), recipe)
    assert plan.kept.keys() == {group.name for group in groups if "mlp" not in group.name}


def test_steps_that_do_not_apply_are_noted_once(tmp_path: Path) -> None:
    model = make_base("resnet", tmp_path)
    result = prune_model(model, PruneRecipe(target_macs="60%", round_to=1), batches_of(model, [4, 4]))
    assert [note for note in result.plan.notes if "prune.rotate" in note] == [
        "prune.rotate changes nothing: the model has no attention heads that can be cut"
    ]
    tiny = open_odd("group_norm_per_channel").model  # its only block is no entry of a list
    steps = {"remove_blocks": "auto", "rotate": False, "reconstruct": "bn"}
    recipe = PruneRecipe(criterion="l1", ratio=0.25, round_to=1, **steps)
    notes = prune_model(tiny, recipe, calibration_batches(3)).plan.notes
    assert [note for note in notes if "changes nothing" in note or "removes nothing" in note] == [
        "prune.remove_blocks auto removes nothing: the model has no removable residual blocks",
        "prune.reconstruct bn changes nothing: the model has no BatchNorm",
    ]
