"""Sentences on a decision: each claim follows from a setting, and a setting without a claim adds none."""

from typing import Any, get_args

import pytest

from isoprune_hf.recipes import Criterion, PruneRecipe, recipe_to_dict
from isoprune_hf.reporting.decision_text import CRITERION_TEXTS, REPAIR_TEXTS, describe_decision

# A claim of the card -> whether it holds for a recipe.
CLAIMS = {
    "within their isomorphic class": lambda r: r.allocation == "class" and r.scope == "isomorphic",
    "of all layers are ranked together": lambda r: r.allocation == "class" and r.scope == "global",
    "only within their own group": lambda r: r.allocation == "class" and r.scope == "local",
    "scopes of their own": lambda r: r.allocation == "class" and bool(r.scopes),
    "compete by the loss that their removal costs": lambda r: r.allocation == "knapsack",
    "each saved MAC.": lambda r: r.allocation == "knapsack" and not r.target_params,
    "each saved parameter.": lambda r: r.allocation == "knapsack" and r.target_params is not None,
    "No images were used": lambda r: r.reads_images is None,
    "(at most 3,200 images)": lambda r: r.reads_images is not None,
    "the rotation": lambda r: r.rotate,
    "attention heads were rotated": lambda r: r.rotate,
    "the repair": lambda r: r.reconstruct != "none",
    "Nothing was repaired": lambda r: r.reconstruct == "none",
    "by least squares": lambda r: r.reconstruct == "least_squares",
    "in 3 steps": lambda r: r.steps == 3,
}


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"preset": "paper"},
        {"criterion": "l1"},
        {"criterion": "l1", "reconstruct": "bn", "scope": "global"},
        {"criterion": "taylor", "scope": "local", "steps": 3},
        {"criterion": "taylor", "scopes": {"blocks.0.*": "first"}},
        {"target_params": "50%"},
    ],
)
def test_sentences_follow_from_the_settings(changes: dict[str, Any]) -> None:
    has_images = changes.get("criterion") != "l1" or "reconstruct" in changes
    recipe = PruneRecipe(model="timm/vit_tiny_patch16_224", **changes).settled(has_images=has_images)
    found = describe_decision(recipe_to_dict(recipe), {}, "train")
    text = " ".join(found.sentences)
    assert {claim: claim in text for claim in CLAIMS} == {
        claim: bool(holds(recipe)) for claim, holds in CLAIMS.items()
    }
    assert f"(criterion `{recipe.criterion}`)" in text and CRITERION_TEXTS[recipe.criterion or ""] in text
    assert found.is_isomorphic == ("arxiv.org" in found.method)
    assert found.is_isomorphic == ("within their isomorphic class" in text and not recipe.scopes)


def test_every_criterion_and_repair_is_described() -> None:
    kinds = [name for part in get_args(Criterion) for name in (get_args(part) or (part,))]
    assert set(CRITERION_TEXTS) == set(kinds)
    assert set(REPAIR_TEXTS) == set(get_args(get_args(PruneRecipe.__annotations__["reconstruct"])[0]))


def test_nothing_is_claimed_without_settings() -> None:
    found = describe_decision({}, {}, None)
    assert (found.sentences, found.method, found.is_isomorphic) == ((), "structured pruning", False)


def test_no_competition_is_claimed_of_open_settings() -> None:
    found = describe_decision(recipe_to_dict(PruneRecipe()), {}, None)
    assert found.method == "structured pruning" and not found.is_isomorphic
    assert "rank" not in " ".join(found.sentences) and "compete" not in " ".join(found.sentences)
