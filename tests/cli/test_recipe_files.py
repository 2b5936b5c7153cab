"""Recipe files: the published ones, files that extend others, and files that are refused."""

import json
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml
from helpers.command_line import refuse, succeed

from isoprune_hf.cli.parser import EMBEDDED_RECIPE, parse
from isoprune_hf.cli.recipe_files import read_recipe, select_stage
from isoprune_hf.cli.table import SECTIONS, STAGES
from isoprune_hf.errors import RecipeError
from isoprune_hf.recipes import PretrainRecipe, recipe_to_dict

ALIASES = "a: &a0 [1, 1]\n" + "".join(f"b{i}: &a{i} [*a{i - 1}, *a{i - 1}]\n" for i in range(1, 60))
MERGES = "a: &a0 {x: 1}\n" + "".join(f"b{i}: &a{i} {{<<: [*a{i - 1}, *a{i - 1}]}}\n" for i in range(1, 60))
RECIPES = Path(__file__).parents[2] / "recipes"
DEIT, TV = "deit_{}_distilled_patch16_224.fb_in1k", "timm/resnet{}.tv_in1k"
# By hand, of the scripts: base, ratio, head ratio, ratio of dims in heads, calibration batches.
CUTS = {
    "deit_4.2g": (f"timm/{DEIT.format('base')}", 0.5, 0.5, 0.25, 50),
    "deit_2.6g": (f"timm/{DEIT.format('base')}", 0.6, 0.6, 0.3, 50),
    "deit_1.2g": (f"timm/{DEIT.format('small')}", 0.5, 0.5, 0.1, 50),
    "deit_0.6g": (f"timm/{DEIT.format('tiny')}", 0.25, 0.3, 0.3, 50),
    "convnext_8.5g": ("timm/convnext_base.fb_in1k", 0.26, 0.0, None, 50),
    "convnext_4.2g": ("timm/convnext_base.fb_in1k", 0.25, 0.0, None, 50),
    "resnet50_2.0g": (TV.format(50), 0.26, 0.0, None, 50),
    "resnet101_4.5g": (TV.format(101), 0.22, 0.0, None, 100),
    "resnet101_3.8g": (TV.format(101), 0.28, 0.0, None, 100),
    "resnet152_4.0g": (TV.format(152), 0.4, 0.0, None, 100),
    "swin_4.5g": ("timm/swin_base_patch4_window7_224.ms_in1k", 0.47, 0.0, None, 50),
    "mobilenet_v2_0.15g": ("torchvision/mobilenet_v2.IMAGENET1K_V1", 0.27, 0.0, None, 50),
}
# Optimizer, learning rate, batch, virtual replicas, epochs, weight decay and what it is on, dropout, drop path.
FINETUNES = {
    "deit_4.2g": ("adamw", 5e-4, 2048, 8, 300, 0.05, "all", 0.0, 0.0),
    "deit_2.6g": ("adamw", 5e-4, 2048, 8, 300, 0.05, "all", 0.0, 0.0),
    "deit_1.2g": ("adamw", 5e-4, 2048, 8, 300, 0.05, "all", 0.0, 0.0),
    "deit_0.6g": ("adamw", 5e-4, 4096, 8, 300, 0.05, "all", 0.0, 0.0),
    "convnext_8.5g": ("adamw", 2e-3, 2048, 16, 300, 0.05, "no_bias_norm", 0.1, 0.4),
    "convnext_4.2g": ("adamw", 2e-3, 2048, 8, 300, 0.05, "no_bias_norm", 0.0, 0.1),
    "resnet50_2.0g": ("sgd", 0.04, 256, 4, 100, 1e-4, "all", 0.1, 0.0),
    "resnet101_4.5g": ("sgd", 0.04, 1024, 4, 100, 1e-4, "all", 0.1, 0.0),
    "resnet101_3.8g": ("sgd", 0.04, 1024, 4, 100, 1e-4, "all", 0.1, 0.0),
    "resnet152_4.0g": ("sgd", 0.04, 1024, 4, 100, 1e-4, "all", 0.1, 0.0),
    "swin_4.5g": ("adamw", 1e-3, 1024, 8, 300, 0.05, "timm", 0.0, 0.2),
    "mobilenet_v2_0.15g": ("sgd", 0.036, 2048, 4, 300, 2e-5, "all", 0.2, None),
}
# By hand, of the published figures: the GMACs of each recipe, which its twin of the preset best has as a budget.
TARGETS = {
    "deit_4.2g": "4.16G",
    "deit_2.6g": "2.61G",
    "deit_1.2g": "1.21G",
    "deit_0.6g": "0.62G",
    "convnext_8.5g": "8.48G",
    "convnext_4.2g": "4.19G",
    "resnet50_2.0g": "2.06G",
    "resnet101_4.5g": "4.48G",
    "resnet101_3.8g": "3.85G",
    "resnet152_4.0g": "4.0G",
    "swin_4.5g": "4.5G",
    "mobilenet_v2_0.15g": "0.15G",
}
NEEDED = {
    "finetune": ["--model", "m"],
    "evaluate": ["--model", "m"],
    "export": ["--folder", "m"],
    "plan apply": ["--plan", "p"],
}


@cache
def resolve(stage: str, name: str) -> Any:
    """Parse a published recipe for a stage, as the command line does."""
    return parse([*stage.split(), "--config", str(RECIPES / f"{name}.yaml"), *NEEDED.get(stage, [])])[1]


def write(folder: Path, **files: str) -> Path:
    """Write recipe files and return the first one."""
    paths = [folder / f"{name}.yaml" for name in files]
    for path, text in zip(paths, files.values(), strict=True):
        path.write_text(text)
    return paths[0]


# Published recipes


def test_published_recipe_is_found_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    published = read_recipe(RECIPES / "deit_4.2g.yaml")
    assert read_recipe("deit_4.2g") == read_recipe("deit_4.2g.yaml") == published
    with pytest.raises(RecipeError, match=r"deit_9\.9g"):
        read_recipe("deit_9.9g")
    (tmp_path / "deit_4.2g.yaml").write_text("prune: {ratio: 0.1}", encoding="utf-8")
    assert read_recipe("deit_4.2g.yaml") == {"prune": {"ratio": 0.1}}


@pytest.mark.parametrize("name", [*CUTS, *(f"{name}_best" for name in CUTS)])
def test_every_recipe_is_read_with_all_sections(name: str) -> None:
    config = resolve("run", name)
    for section in STAGES["run"].sections:
        assert isinstance(config[section], SECTIONS[section])


@pytest.mark.parametrize("name", ["deit_4.2g", pytest.param("convnext_4.2g_best", marks=pytest.mark.families)])
def test_every_stage_reads_a_recipe(name: str) -> None:
    for stage, declared in STAGES.items():
        config = resolve(stage, name) if declared.sections else {}
        for section in declared.sections:
            assert isinstance(config[section], SECTIONS[section])


@pytest.mark.parametrize("name", CUTS)
def test_recipe_cuts_like_script_of_its_name(name: str) -> None:
    cut = resolve("prune", name).prune
    assert (cut.model, cut.ratio, cut.head_ratio, cut.head_dim_ratio, cut.calibration_batches) == CUTS[name]
    assert (cut.criterion, cut.reduction, cut.normalizer, cut.score_batchnorm) == ("taylor", "mean", "mean", False)
    assert (cut.scope, cut.round_to, cut.batch_size, cut.target_macs) == ("isomorphic", 2, 64, None)
    assert (cut.allocation, cut.rotate, cut.reconstruct) == ("class", False, "none")
    assert cut.remove_blocks == ({"stages.2.*": 18} if name == "convnext_4.2g" else None)


@pytest.mark.parametrize("name", FINETUNES)
def test_recipe_finetunes_like_script_of_its_name(name: str) -> None:
    tuning = resolve("run", name).finetune
    assert (
        tuning.optimizer,
        tuning.learning_rate,
        tuning.batch_size,
        tuning.virtual_replicas,
        tuning.epochs,
        tuning.weight_decay,
        tuning.weight_decay_rule,
        tuning.dropout,
        tuning.drop_path,
    ) == FINETUNES[name]
    assert tuning.batch_size % tuning.virtual_replicas == 0
    assert resolve("run", name).pretrain == PretrainRecipe()


@pytest.mark.parametrize(
    ("family", "values"),
    [
        (
            "deit",
            {"schedule": "cosine", "schedule_unit": "epoch", "warmup_epochs": 0, "min_learning_rate": 0.0}
            | {"mixup": 0.8, "cutmix": 1.0, "mixup_pairing": "roll", "label_smoothing": 0.1}
            | {"auto_augment": "tv-rand-n2-m9", "random_erasing": 0.25, "random_erasing_fill": "zero"}
            | {"repeated_augmentation": 3, "interpolation": "bicubic", "drop_last": False, "best": "raw"}
            | {"distillation": "hard", "teacher": "timm/regnety_160.deit_in1k", "distillation_weight": 0.5}
            | {"distillation_head": "token", "teacher_label_smoothing": 0.1, "ema_decay": None},
        ),
        (
            "convnext",
            {"schedule": "cosine", "schedule_unit": "epoch", "warmup_epochs": 0, "min_learning_rate": 1e-6}
            | {"mixup": 0.2, "cutmix": 1.0, "mixup_pairing": "flip", "label_smoothing": 0.1}
            | {"auto_augment": "rand-m9-mstd0.5-inc1", "random_erasing": 0.25, "random_erasing_fill": "pixel"}
            | {"repeated_augmentation": 1, "drop_last": True, "ema_decay": 0.9999, "best": "ema"}
            | {"distillation": "none"},
        ),
        (
            "resnet",
            {"schedule": "step", "schedule_unit": "epoch", "step_epochs": 30, "step_gamma": 0.1, "momentum": 0.9}
            | {"mixup": 0.0, "cutmix": 0.0, "label_smoothing": 0.0, "auto_augment": None, "random_erasing": 0.0}
            | {"interpolation": "bilinear", "drop_last": False, "distillation": "none", "ema_decay": None},
        ),
        (
            "mobilenet",
            {"schedule": "cosine", "schedule_unit": "epoch", "warmup_epochs": 0, "min_learning_rate": 0.0}
            | {"mixup": 0.0, "label_smoothing": 0.0, "interpolation": "bilinear", "distillation": "none"},
        ),
        (
            "swin",
            {"schedule": "cosine", "warmup_epochs": 20, "min_learning_rate": 1e-5, "clip_grad": 5.0}
            | {"mixup": 0.8, "cutmix": 1.0, "label_smoothing": 0.1, "distillation": "none", "ema_decay": None},
        ),
    ],
)
def test_family_shares_remaining_settings(family: str, values: dict[str, Any]) -> None:
    names = [name for name in CUTS if name.startswith(family)]
    for name in names:
        tuning = recipe_to_dict(resolve("run", name).finetune)
        assert {key: tuning[key] for key in values} == values, name


@pytest.mark.parametrize("name", TARGETS)
def test_best_twin_differs_only_in_cut(name: str) -> None:
    published, best = resolve("run", name), resolve("run", f"{name}_best")
    first, second = recipe_to_dict(published.prune), recipe_to_dict(best.prune)
    assert {key: value for key, value in second.items() if first[key] != value} == {
        "preset": "best",
        "criterion": "trial_loss",
        "allocation": "knapsack",
        "rotate": True,
        "reconstruct": "least_squares",
        "reduction": "sum",
        "normalizer": "none",
        "score_batchnorm": True,
        "target_macs": TARGETS[name],
        "round_to": 8,
    }
    assert (best.data, best.pretrain, best.finetune) == (published.data, published.pretrain, published.finetune)


def test_best_twins_expect_size_without_accuracy() -> None:
    assert {path.stem for path in RECIPES.glob("*_best.yaml")} == {f"{name}_best" for name in CUTS}
    for name in CUTS:
        assert float(TARGETS[name].removesuffix("G")) == read_recipe(RECIPES / f"{name}.yaml")["expect"]["gmacs"]
        recipe = read_recipe(RECIPES / f"{name}_best.yaml")
        assert "expect" not in recipe and "not trained here" in recipe["source"]


def test_recipe_evaluates_like_script_of_its_name() -> None:
    for name in CUTS:
        bilinear = name.startswith(("resnet", "mobilenet"))
        data = resolve("evaluate", name).data
        assert (data.resize, data.interpolation) == (256, "bilinear" if bilinear else "bicubic"), name
        # Only the script of ResNet-50 scores with another interpolation than it evaluates with.
        assert resolve("prune", name).prune.interpolation == ("bicubic" if name == "resnet50_2.0g" else None), name


def test_crops_of_two_convnexts_differ() -> None:
    found = {name: resolve("run", name).finetune.interpolation for name in CUTS if name.startswith("convnext")}
    assert found == {"convnext_8.5g": "bicubic", "convnext_4.2g": "random"}


def test_every_recipe_names_source_and_published_figures() -> None:
    named = {path.stem for path in RECIPES.glob("*_*g.yaml") if not path.stem.startswith("_")}
    assert named == CUTS.keys()
    for name in named:
        recipe = read_recipe(RECIPES / f"{name}.yaml")
        assert abs(recipe["expect"]["gmacs"] - float(name.rpartition("_")[2].removesuffix("g"))) < 0.1, name
        assert ("our own proposal" in recipe["source"]) == (name == "swin_4.5g")


def test_printed_config_is_complete_recipe(tmp_path: Path) -> None:
    printed = succeed("run", "--config", RECIPES / "deit_4.2g.yaml", "--print_config", "--finetune.epochs", "9")
    shown = yaml.safe_load(printed)
    pushes = {"push_to_hub", "push_every"}
    assert shown.keys() == {"prune", "data", "pretrain", "finetune", "output", "overwrite"} | pushes
    expected = resolve("run", "deit_4.2g")
    expected.prune = expected.prune.settled(has_images=True)
    for name in ("prune", "data", "finetune"):
        assert shown[name] == recipe_to_dict(expected[name]) | ({"epochs": 9} if name == "finetune" else {})
    again = parse(["run", "--config", str(write(tmp_path, printed=printed))])[1]
    assert (again.prune, again.finetune.epochs) == (expected.prune, 9)


@pytest.mark.parametrize(
    ("settings", "taken"),
    [
        ("", ("trial_loss", "knapsack", True, "least_squares", "none", "sum")),
        ("ratio: 0.3, rotate: false", ("trial_loss", "knapsack", False, "least_squares", "none", "sum")),
        ("criterion: l1", ("l1", "class", False, "none", "mean", "sum")),
        ("criterion: l1, normalizer: max, rotate: true", ("l1", "class", True, "none", "max", "sum")),
        ("preset: best, target_macs: 1G", ("trial_loss", "knapsack", True, "least_squares", "none", "sum")),
        ("preset: paper", ("taylor_l2", "class", False, "none", "none", "sum")),
        ("preset: reference", ("taylor_reference", "class", False, "none", "mean", "mean")),
    ],
)
def test_printed_config_has_values_of_preset(settings: str, taken: tuple, tmp_path: Path) -> None:
    file = write(tmp_path, given=f"prune: {{model: a, ratios: {{x.*: 0.1}}, {settings}}}")
    printed = succeed("prune", "--config", file, "--print_config")
    shown = yaml.safe_load(printed)["prune"]
    names = ("criterion", "allocation", "rotate", "reconstruct", "normalizer", "reduction")
    assert tuple(shown[name] for name in names) == taken
    first, second = (
        parse(["prune", "--config", str(path)])[1].prune for path in (file, write(tmp_path, printed=printed))
    )
    assert recipe_to_dict(second) == shown
    assert second == first.settled(has_images=first.reads_images == "criterion")


def test_config_contradicting_preset_is_refused() -> None:
    line = refuse("prune", "--prune.preset", "best", "--prune.criterion", "l1", "--print_config")
    assert "prune.preset best takes prune.criterion trial_loss, got l1" in line


# Files that extend others


def test_extending_file_overrides_its_base(tmp_path: Path) -> None:
    (tmp_path / "shared").mkdir()
    write(
        tmp_path / "shared",
        first="prune: {model: a, ratio: 0.1, ratios: {x: 0.1, y: 0.2}}\nfinetune: {epochs: 1}\nexpect: {gmacs: 1}\n",
        second="extends: first.yaml\nprune: {ratio: 0.2, ratios: {y: 0.3}}\ndata: {dataset: digits}\nsource: theirs\n",
    )
    top = write(tmp_path, top="extends: shared/second.yaml\nprune: {model: b, include: [z]}\nexpect: {params_m: 2}\n")
    assert read_recipe(top) == {
        "prune": {"model": "b", "ratio": 0.2, "ratios": {"x": 0.1, "y": 0.3}, "include": ["z"]},
        "data": {"dataset": "digits"},
        "finetune": {"epochs": 1},
        "expect": {"params_m": 2},
    }


def test_stage_gets_only_its_own_sections() -> None:
    recipe = {"prune": {}, "data": {}, "finetune": {}, "output": "o", "source": "s", "expect": {}}
    assert select_stage(recipe, "run").keys() == {"prune", "data", "finetune", "output"}
    assert select_stage(recipe, "finetune").keys() == {"data", "finetune"}
    assert select_stage(recipe, "inspect").keys() == {"prune", "data"}
    assert select_stage(recipe, "doctor") == {}


def test_embedded_recipe_is_read_by_read_recipe() -> None:
    assert read_recipe(EMBEDDED_RECIPE)["data"]["dataset"] == "digits"


BAD = {
    "itself": ({"top": "extends: top.yaml"}, ["top.yaml extends", "in a cycle"]),
    "a circle": (
        {"top": "extends: two.yaml", "two": "extends: three.yaml", "three": "extends: top.yaml"},
        ["top.yaml extends", "two.yaml extends", "three.yaml extends", "in a cycle"],
    ),
    "missing": ({"top": "extends: gone.yaml"}, ["gone.yaml cannot be read (No such file", "top.yaml extends it"]),
    "a folder": ({"top": "extends: ."}, ["cannot be read (Is a directory)"]),
    "holds itself": ({"top": "prune: &a {model_args: *a}"}, ["top.yaml is not YAML: an alias contains itself"]),
    "no plain value": ({"top": "prune: {model_args: {a: !!set {b}}}"}, ["top.yaml is not YAML", "set"]),
    "no path": ({"top": "extends: [a.yaml]"}, ["extends of", "the path of a recipe file, got ['a.yaml']"]),
    "nothing": ({"top": "extends:\nprune: {ratio: 0.1}"}, ["must be the path of a recipe file, got None"]),
    "unknown key below": ({"top": "extends: two.yaml", "two": "prune: {modle: x}"}, ["two.yaml", "prune.model?"]),
    "unknown section": ({"top": "extend: two.yaml"}, ["unknown section 'extend'; did you mean extends?"]),
    "unknown figure": ({"top": "expect: {gmac: 1}"}, ["unknown setting expect.gmac; did you mean expect.gmacs?"]),
    "no figure": ({"top": "expect: {top1: high}"}, ["expect.top1 of", "must be a number above 0, got 'high'"]),
    "negative": ({"top": "expect: {top1: -1}"}, ["must be a number above 0, got -1"]),
    "truth": ({"top": "expect: {top1: true}"}, ["must be a number above 0, got True"]),
    "not finite": ({"top": "expect: {top1: .nan}"}, ["must be a number above 0, got nan"]),
    "no figures": ({"top": "expect: 4.2"}, ["section expect of", "must contain settings, got 4.2"]),
    "no source": ({"top": "source: [a]"}, ["source of", "must be a text, got ['a']"]),
}


@pytest.mark.parametrize("kind", BAD)
def test_bad_extended_file_is_one_line(kind: str, tmp_path: Path) -> None:
    files, words = BAD[kind]
    line = refuse("prune", "--config", write(tmp_path, **files))
    assert [word for word in words if word not in line] == [], line


def test_file_may_be_extended_by_two_others(tmp_path: Path) -> None:
    write(tmp_path, base="prune: {model: a}", left="extends: base.yaml", right="extends: base.yaml")
    assert read_recipe(tmp_path / "left.yaml") == read_recipe(tmp_path / "right.yaml") == {"prune": {"model": "a"}}


def test_recipe_that_links_to_itself_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").symlink_to("a.yaml")
    with pytest.raises(RecipeError, match=r"a\.yaml cannot be read"):
        read_recipe(tmp_path / "a.yaml")


def test_missing_recipe_is_named(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"none\.yaml .*No such file"):
        read_recipe(tmp_path / "none.yaml")


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (ALIASES, "more than 10,000 values"),
        (MERGES, "more than 10,000 values"),
        ("prune: &a {model: *a}\n", "an alias contains itself"),
        ("data: {mean: [" + "1," * 10_000 + "]}\n", "more than 10,000 values"),
        ("# " + "x" * 2**16, "more than 65,536 bytes"),
        ("a: " + "[" * 2000, "not YAML"),
        ("prune: {ratio: " + "9" * 5000 + "}\n", "not YAML"),
        ('prune: {model: "\\0"}\n', None),
    ],
    ids=["aliases", "merges", "cycle", "values", "bytes", "nested", "digits", "zero byte"],
)
def test_recipe_that_expands_is_refused(text: str, reason: str | None, tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text(text)
    if reason is None:
        assert read_recipe(tmp_path / "r.yaml") == {"prune": {"model": "\0"}}
    else:
        with pytest.raises(RecipeError, match=reason):
            read_recipe(tmp_path / "r.yaml")


def test_chain_of_recipes_ends(tmp_path: Path) -> None:
    (tmp_path / "0.yaml").write_text("prune: {ratio: 0.25}\n")
    for number in range(1, 17):
        (tmp_path / f"{number}.yaml").write_text(f"extends: {number - 1}.yaml\n")
    assert read_recipe(tmp_path / "15.yaml") == {"prune": {"ratio": 0.25}}
    with pytest.raises(RecipeError, match="a chain of more than 15 files"):
        read_recipe(tmp_path / "16.yaml")


@pytest.mark.parametrize("path", ["x" * 3000, "x" * 3000 + "/base.yaml", "a/" * 2500 + "base.yaml"])
def test_too_long_path_of_extended_file_is_refused(path: str, tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text(json.dumps({"extends": path}))
    with pytest.raises(RecipeError, match="File name too long"):
        read_recipe(tmp_path / "recipe.yaml")


@pytest.mark.parametrize("path", ["a\0b.yaml", "a\nb.yaml", "\x1b[2J", ""])
def test_path_of_extended_file_is_printable(path: str, tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text(json.dumps({"extends": path, "prune": {"seed": 1}}))
    assert "extends" in refuse("prune", "--config", tmp_path / "recipe.yaml")


@pytest.mark.parametrize(
    "text", ["prune: {seed: 1, seed: 2}", "prune: {seed: 1}\nprune: {round_to: 2}", "a: &a {b: 1, b: 1}"]
)
def test_setting_that_stands_twice_is_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text(text)
    with pytest.raises(RecipeError, match="stands twice, in line 1"):
        read_recipe(tmp_path / "recipe.yaml")
