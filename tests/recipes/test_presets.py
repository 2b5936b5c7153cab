"""Naming a setting changes that setting alone, with and without images."""

from dataclasses import replace

import pytest

from isoprune_hf.errors import RecipeError
from isoprune_hf.recipes import PruneRecipe
from isoprune_hf.recipes.presets import DATA_CRITERIA, LOSS_CRITERIA, PRESETS, WEIGHT_CRITERIA

CRITERIA = (*DATA_CRITERIA, *WEIGHT_CRITERIA)
BEST = PruneRecipe().settled(has_images=True)
OTHER_VALUES = {"allocation": "class", "rotate": False, "reconstruct": "bn", "max_ratio": 0.5, "round_to": 4}


def test_recipe_without_settings_is_best() -> None:
    assert replace(PruneRecipe(preset="best"), preset=None, max_ratio=1.0) == BEST
    assert BEST.taken_preset == "best"


@pytest.mark.parametrize("criterion", CRITERIA)
def test_named_criterion_keeps_repair_with_images(criterion: str) -> None:
    comparable = {} if criterion in LOSS_CRITERIA else {"allocation": "class", "normalizer": "mean"}
    expected = replace(BEST, criterion=criterion, **comparable)
    assert PruneRecipe(criterion=criterion).settled(has_images=True) == expected


@pytest.mark.parametrize("name", OTHER_VALUES)
@pytest.mark.parametrize("criterion", [None, "gate_fisher", "taylor", "l1"])
@pytest.mark.parametrize("has_images", [True, False])
def test_named_setting_changes_itself_alone(name: str, criterion: str | None, *, has_images: bool) -> None:
    value = OTHER_VALUES[name]
    alone = PruneRecipe(criterion=criterion).settled(has_images=has_images)
    assert PruneRecipe(criterion=criterion, **{name: value}).settled(has_images=has_images) == replace(
        alone, **{name: value}
    )


@pytest.mark.parametrize("criterion", WEIGHT_CRITERIA)
def test_weights_without_images_have_a_floor(criterion: str) -> None:
    recipe = PruneRecipe(criterion=criterion).settled(has_images=False)
    assert (recipe.allocation, recipe.normalizer, recipe.max_ratio) == ("class", "mean", 0.75)
    assert (recipe.rotate, recipe.reconstruct, recipe.reads_images) == (False, "none", None)


def test_floor_of_weights_allows_named_ratios() -> None:
    named = {"ratio": 0.8, "head_ratio": 0.9, "ratios": {"a": 0.95}}
    found = [PruneRecipe(criterion="l1", **{name: named[name]}).settled(has_images=False) for name in named]
    assert [recipe.max_ratio for recipe in found] == [0.8, 0.9, 0.95]


def test_named_knapsack_takes_scores_as_they_are() -> None:
    assert PruneRecipe(criterion="l1", allocation="knapsack").settled(has_images=False).normalizer == "none"
    with pytest.raises(RecipeError, match=r"prune\.normalizer none"):
        PruneRecipe(allocation="knapsack", normalizer="mean")


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("has_images", [True, False])
def test_named_preset_is_complete(preset: str, *, has_images: bool) -> None:
    named = PruneRecipe(preset=preset)
    settled = named.settled(has_images=has_images)
    plain = {"normalizer": PRESETS[preset]["normalizer"], "max_ratio": 1.0}
    assert settled == replace(named, **plain) and settled.taken_preset == preset


@pytest.mark.parametrize("has_images", [True, False])
def test_settling_twice_changes_nothing(*, has_images: bool) -> None:
    for criterion in (None, *CRITERIA):
        once = PruneRecipe(criterion=criterion).settled(has_images=has_images)
        assert once.settled(has_images=True) == once.settled(has_images=False) == once
