import math
from dataclasses import fields
from typing import get_args

import numpy as np
import pytest

from isoprune_hf.errors import RecipeError
from isoprune_hf.recipes import (
    Budget,
    DataRecipe,
    FinetuneRecipe,
    PruneRecipe,
    data,
    finetune,
    prune,
    recipe_to_dict,
    resume_identity,
)
from isoprune_hf.recipes.values import _values, shorten


@pytest.mark.parametrize(
    ("text", "macs"),
    [
        ("4.2G", 4_200_000_000),
        ("350M", 350_000_000),
        ("50%", 100),
        ("12.5 %", 25),
        ("1e3", 1000),
        (77, 77),
        (".5k", 500),
    ],
)
def test_budget_parses_sizes_and_shares(text, macs: int) -> None:
    assert PruneRecipe(criterion="taylor", target_macs=text).budget.resolve(200) == macs


@pytest.mark.parametrize(
    "text",
    [
        "",
        "G",
        "-1G",
        "0",
        "4.2 GB",
        "50%%",
        "nan",
        "1_000",
        "fifty",
        "1e999",
        "9" * 400,
        10**5000,
        1e19,
        float("inf"),
        True,
    ],
    ids=shorten,
)
def test_malformed_size_is_refused(text: str) -> None:
    with pytest.raises(RecipeError, match=r"must be a size such as 4.2G, 350M or 50%"):
        PruneRecipe(criterion="taylor", target_macs=text)


@pytest.mark.parametrize(
    ("recipe", "values", "message"),
    [
        (PruneRecipe, {"ratio": 1.5}, "prune.ratio must be between 0 and 1, got 1.5"),
        (PruneRecipe, {"round_to": 0}, "prune.round_to must be a whole number between 1 and 1048576, got 0"),
        (DataRecipe, {"std": [0.5, 0.0, 0.5]}, "data.std must be between 1e-06 and 1, got 0.0"),
        (FinetuneRecipe, {"crop_scale": (0.9, 0.5)}, "crop_scale must be two numbers"),
        (FinetuneRecipe, {"clip_grad": 0.0}, "clip_grad must be above 0 and at most 1000000000000, got 0.0"),
        (FinetuneRecipe, {"ema_decay": 1}, "finetune.ema_decay must be at least 0 and below 1, got 1$"),
        (FinetuneRecipe, {"epochs": 10**400}, "finetune.epochs .* got a number of 1329 bits$"),
    ],
)
def test_value_out_of_range_names_allowed_values(recipe, values, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        recipe(**values)


RANGES = {PruneRecipe: prune.RANGES, DataRecipe: data.RANGES, FinetuneRecipe: finetune.RANGES}
NUMBERS = [(recipe, name) for recipe, ranges in RANGES.items() for name in ranges]


def _has_numbers(kind: object) -> bool:
    return kind in (int, float) or any(map(_has_numbers, get_args(kind)))


@pytest.mark.parametrize("recipe", RANGES)
def test_every_setting_with_numbers_has_a_range(recipe) -> None:
    settings = {setting.name for setting in fields(recipe) if _has_numbers(setting.type)}
    assert settings - {"target_macs", "target_params", "target_latency"} == RANGES[recipe].keys()


def _inside(recipe, name: str, value: object) -> object:
    """Return a value in a container of the setting's type."""
    setting = next(setting for setting in fields(recipe) if setting.name == name)
    if setting.type == dict[str, float]:
        return {"blocks.*": value}
    if "list[float]" in str(setting.type):
        return [value, 0.5]
    return (value, 0.5) if "tuple" in str(setting.type) else value


@pytest.mark.parametrize(("recipe", "name"), NUMBERS, ids=lambda value: getattr(value, "__name__", value))
def test_number_out_of_its_range_is_refused(recipe, name: str) -> None:
    allowed = RANGES[recipe][name]
    beyond = [
        math.nan,
        math.inf,
        -math.inf,
        float("1e999"),
        10**400,
        10**5000,
        -1,
        allowed.high * 2 + 1,
        True,
        b"1",
        np.int64(1),
    ]
    beyond += [allowed.excluded] * (allowed.excluded is not None) + [1.5] * allowed.whole
    for value in [*beyond, *([] if allowed.or_text else ["1"])]:
        with pytest.raises(RecipeError, match=rf"\.{name}\b"):
            recipe(**{name: _inside(recipe, name, value)})


@pytest.mark.parametrize(("recipe", "name"), NUMBERS, ids=lambda value: getattr(value, "__name__", value))
def test_ends_of_a_range_are_allowed(recipe, name: str) -> None:
    allowed = RANGES[recipe][name]
    assert math.isfinite(allowed.low) and math.isfinite(allowed.high)
    assert all((end in allowed) is (end != allowed.excluded) for end in (allowed.low, allowed.high))
    default = getattr(recipe(), name)
    assert all(value in allowed for _, value in _values(name, default))


@pytest.mark.parametrize(
    ("recipe", "values"),
    [(DataRecipe, {"num_workers": 100_000}), (PruneRecipe, {"steps": 1_000_000}), (DataRecipe, {"mean": [np.nan]})],
)
def test_absurd_number_is_refused(recipe, values: dict) -> None:
    with pytest.raises(RecipeError, match=next(iter(values))):
        recipe(**values)


def test_a_recipe_becomes_plain_values() -> None:
    assert recipe_to_dict(FinetuneRecipe())["crop_scale"] == [0.08, 1.0]
    assert recipe_to_dict(PruneRecipe(criterion="taylor", model="m"))["model"] == "m"


@pytest.mark.parametrize(
    ("setting", "text", "budget"),
    [
        ("target_macs", "4.2G", Budget("macs", 4.2e9, is_share=False)),
        ("target_params", "62.5%", Budget("params", 62.5, is_share=True)),
        ("target_latency", "0.5s", Budget("latency", 500.0, is_share=False)),
    ],
)
def test_recipe_parses_its_budget_once(setting: str, text: str, budget: Budget) -> None:
    recipe = PruneRecipe(criterion="taylor", **{setting: text})
    assert recipe.budget == budget and recipe.budget is recipe.budget
    assert (budget.setting, Budget.parse(str(budget), budget.kind)) == (setting, budget)
    assert recipe_to_dict(recipe)[setting] == text and "budget" not in recipe_to_dict(recipe)


def test_counts_are_rounded_and_times_are_not() -> None:
    assert Budget.parse("50%", "macs").resolve(101) == 50
    assert Budget.parse("50%", "latency").resolve(101) == 50.5
    assert PruneRecipe(criterion="l1").budget is None


@pytest.mark.parametrize(
    ("values", "setting"),
    [
        ({"criterion": "taylor", "rotate": True}, "criterion"),
        ({"criterion": "l1", "rotate": True, "reconstruct": "bn"}, "rotate"),
        ({"criterion": "l1", "reconstruct": "bn"}, "reconstruct"),
        ({"criterion": "l1"}, None),
    ],
)
def test_recipe_names_setting_that_reads_images(values: dict, setting: str | None) -> None:
    assert PruneRecipe(**values).reads_images == setting


def test_resume_identity_omits_settings_without_effect() -> None:
    ignored = {
        "save_every",
        "state_every",
        "state_minutes",
        "log_every",
        "tracker",
        "rank_minutes",
        "max_minutes",
        "peak_tflops",
    }
    finetune = FinetuneRecipe()
    assert recipe_to_dict(finetune).keys() - resume_identity(finetune).keys() == ignored
    data = DataRecipe()
    assert recipe_to_dict(data).keys() - resume_identity(data).keys() == {
        *("dataset", "subset", "revision", "batch_size", "num_workers", "max_broken", "holdout")
    }
