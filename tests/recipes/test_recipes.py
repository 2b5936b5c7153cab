import pytest

from isoprune_hf.errors import RecipeError
from isoprune_hf.recipes import Budget, DataRecipe, FinetuneRecipe, PruneRecipe, recipe_to_dict, resume_identity


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


@pytest.mark.parametrize("text", ["", "G", "-1G", "0", "4.2 GB", "50%%", "nan", "1_000", "fifty"])
def test_malformed_size_is_refused(text: str) -> None:
    with pytest.raises(RecipeError, match=r"must be a size such as 4.2G, 350M or 50%"):
        PruneRecipe(criterion="taylor", target_macs=text)


@pytest.mark.parametrize(
    ("recipe", "values", "message"),
    [
        (PruneRecipe, {"ratio": 1.5}, "prune.ratio must be between 0 and 1, got 1.5"),
        (PruneRecipe, {"head_ratio": -0.1}, "prune.head_ratio must be between 0 and 1"),
        (PruneRecipe, {"ratio": float("nan")}, "prune.ratio must be between 0 and 1, got nan"),
        (PruneRecipe, {"round_to": 0}, "prune.round_to must be at least 1, got 0"),
        (PruneRecipe, {"num_labels": 0}, "prune.num_labels must be at least 1"),
        (DataRecipe, {"resize": 0}, "data.resize must be between 1 and 16384, got 0"),
        (DataRecipe, {"batch_size": 0}, "data.batch_size must be at least 1"),
        (DataRecipe, {"std": [0.5, 0.0, 0.5]}, "data.std must be between 1e-06 and 1, got 0.0"),
        (FinetuneRecipe, {"epochs": -1}, "epochs must be at least 0"),
        (FinetuneRecipe, {"temperature": 0}, "temperature must be above 0"),
        (FinetuneRecipe, {"crop_scale": (0.9, 0.5)}, "crop_scale must be two numbers"),
        (FinetuneRecipe, {"clip_grad": 0.0}, "clip_grad must be above 0"),
        (FinetuneRecipe, {"ema_decay": 1}, "finetune.ema_decay must be at least 0 and below 1, got 1$"),
        (FinetuneRecipe, {"dropout": 1.0}, "finetune.dropout must be at least 0 and below 1, got 1.0$"),
        (FinetuneRecipe, {"drop_path": 1.5}, "finetune.drop_path must be at least 0 and below 1, got 1.5$"),
        (FinetuneRecipe, {"dropout": float("nan")}, "finetune.dropout must be at least 0 and below 1, got nan$"),
        (FinetuneRecipe, {"label_smoothing": 2}, "label_smoothing must be between 0 and 1"),
    ],
)
def test_value_out_of_range_names_allowed_values(recipe, values, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
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
        *("dataset", "revision", "batch_size", "num_workers", "max_broken")
    }
