"""The stages plan show, plan diff and plan apply."""

import json
import re
import shutil
from pathlib import Path

import pytest
from helpers.command_line import contents, isoprune, read, refuse, succeed
from helpers.cut_folders import MODEL_ARGS, NAME, OPEN, check_refused


def test_plan_in_folder_shows_sizes_of_base(folders: Path, tmp_path: Path) -> None:
    plan = read(folders / "small", "pruning_plan.json")
    kept, heads = len(plan["kept"]["blocks.0.attn"]), len(plan["heads"]["blocks.0.attn"])
    shown = succeed("plan", "show", folders / "small")
    assert re.search(rf"^blocks.0.attn +{kept} of 32 +\d+% +{heads} of 4 +{kept // heads} of 8$", shown, re.MULTILINE)
    assert re.search(r"^blocks.0.mlp.fc1 +\d+ of 128 +\d+%$", shown, re.MULTILINE)
    assert "criterion l1" in shown and plan["fingerprint"][:12] in shown
    file = shutil.copy(folders / "small" / "pruning_plan.json", tmp_path / "plan.json")
    without_folder = succeed("plan", "show", "--plan", file)
    assert re.search(rf"^blocks.0.attn +{kept} +{heads} +{kept // heads}$", without_folder, re.MULTILINE)
    assert " of 32" not in without_folder


def test_plan_is_shown_without_readable_model(folders: Path, tmp_path: Path) -> None:
    broken = shutil.copytree(folders / "small", tmp_path / "broken")
    (broken / "model.safetensors").write_bytes(b"broken")
    assert "blocks.0.attn" in succeed("plan", "show", broken)


def test_diff_exits_with_1_if_plans_differ(folders: Path) -> None:
    small, large = folders / "small", folders / "large"
    same = isoprune("plan", "diff", small, small / "pruning_plan.json")
    assert (same.code, same.out, same.err) == (0, "the plans are equal\n", "")
    different = isoprune("plan", "diff", small, large)
    assert (different.code, different.err) == (1, "")
    assert f"A: {small}\nB: {large}\n" in different.out and "settings.target_macs" in different.out
    assert isoprune("plan", "diff", "--second", large, "--first", small) == different


@pytest.mark.parametrize("given", ["folder", "file", "recipe"])
def test_replay_writes_same_folder_as_cut(given: str, folders: Path, tmp_path: Path) -> None:
    small, again = folders / "small", tmp_path / "again"
    plan = small if given == "folder" else small / "pruning_plan.json"
    base = ["--model", NAME, *OPEN]
    if given == "recipe":
        prune = {"model": NAME, "pretrained": False, "model_args": MODEL_ARGS, "num_labels": 10, "criterion": "taylor"}
        (tmp_path / "recipe.json").write_text(json.dumps({"prune": prune, "finetune": {"epochs": 3}}))
        base = ["--config", tmp_path / "recipe.json"]
    printed = succeed("plan", "apply", plan, *base, "--output", again)
    assert f"The model is in {again}" in printed
    assert {path.name for path in again.iterdir()} == {path.name for path in small.iterdir()}
    for name in ("model.safetensors", "pruning_plan.json", "preprocessor_config.json"):
        assert (again / name).read_bytes() == (small / name).read_bytes()
    first, second = read(small, "config.json"), read(again, "config.json")
    assert {key for key in first if first[key] != second[key]} <= {"recipe"}
    assert second["recipe"]["prune"]["criterion"] == "l1" and second["recipe"]["prune"]["round_to"] == 4


CONV = ["timm/test_resnet", "--no-pretrained", "--prune.num_labels", "10"]


@pytest.fixture(scope="module")
def sized(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a convolutional network that was cut at 32 pixels, where its own size is 160."""
    folder = tmp_path_factory.mktemp("sized") / "pruned"
    small = ["--image-size", "32", "--data.mean", "[0.5, 0.5, 0.5]"]
    succeed("prune", *CONV, *small, "--criterion", "l1", "--target-macs", "50%", "--output", folder)
    return folder


def test_replay_takes_image_size_of_plan(sized: Path, tmp_path: Path) -> None:
    transform = {"image_size": 32, "mean": [0.5, 0.5, 0.5]}
    assert read(sized, "pruning_plan.json")["settings"]["transform"] == transform
    succeed("plan", "apply", sized, "--model", *CONV, "--output", tmp_path / "again")
    for name in ("model.safetensors", "pruning_plan.json", "preprocessor_config.json"):
        assert (tmp_path / "again" / name).read_bytes() == (sized / name).read_bytes()
    assert read(tmp_path / "again", "config.json")["image_size"] == [3, 32, 32]


def test_image_size_of_older_plan_is_named(sized: Path, tmp_path: Path) -> None:
    plan = read(sized, "pruning_plan.json")
    recorded = plan["settings"].pop("transform")
    (tmp_path / "plan.json").write_text(json.dumps(plan))
    arguments = ["plan", "apply", tmp_path / "plan.json", "--model", *CONV]
    succeed(*arguments, "--image-size", "32", "--data.mean", "[0.5, 0.5, 0.5]", "--output", tmp_path / "named")
    assert read(tmp_path / "named", "pruning_plan.json")["settings"]["transform"] == recorded


WRONG_TRANSFORMS: dict[str, tuple[object, list[str], str]] = {
    "other size": (None, ["--image-size", "64"], "data.image_size 64: the plan was made on images of image_size 32"),
    "no mapping": ([32], [], "settings.transform must map names to settings"),
    "unknown entry": ({"crop": 32}, [], "settings.transform: unknown entry 'crop'"),
    "bad value": ({"image_size": -1}, [], "settings.transform: data.image_size must be"),
}


@pytest.mark.parametrize("kind", WRONG_TRANSFORMS)
def test_transform_that_does_not_fit_is_refused(kind: str, sized: Path, tmp_path: Path) -> None:
    transform, flags, words = WRONG_TRANSFORMS[kind]
    plan = read(sized, "pruning_plan.json")
    if transform is not None:
        plan["settings"]["transform"] = transform
    (tmp_path / "plan.json").write_text(json.dumps(plan))
    line = refuse("plan", "apply", tmp_path / "plan.json", "--model", *CONV, *flags, "--output", tmp_path / "out")
    assert words in line
    assert [path.name for path in tmp_path.iterdir()] == ["plan.json"]


def test_plan_of_other_base_needs_ignore_fingerprint(folders: Path, tmp_path: Path) -> None:
    arguments = ["plan", "apply", folders / "other", "--model", NAME, *OPEN, "--output", tmp_path / "out"]
    line = refuse(*arguments)
    assert "other weights" in line and "--ignore_fingerprint true" in line
    assert contents(tmp_path) == {}
    succeed(*arguments, "--ignore_fingerprint", "true")
    kept = read(folders / "other", "pruning_plan.json")["kept"]
    assert read(tmp_path / "out", "pruning_plan.json")["kept"] == kept
    source = read(folders / "small", "config.json")["source"]["fingerprint"]
    assert read(tmp_path / "out", "config.json")["source"]["fingerprint"] == source


IGNORE = ["--ignore_fingerprint", "true", "--output", "@tmp/out"]
BAD_INPUT: dict[str, tuple[list[str], list[str]]] = {
    "no action": (["plan"], ["plan needs one of show, diff, apply"]),
    "unknown action": (["plan", "shw"], ["'shw'", "did you mean show?"]),
    "unknown stage": (["plna"], ["unknown stage 'plna'", "did you mean plan?"]),
    "no plan": (["plan", "show"], ["required", "plan"]),
    "one plan": (["plan", "diff", "@small"], ["required", "second"]),
    "three plans": (["plan", "diff", "@small", "@small", "stray"], ["stray"]),
    "unknown flag": (["plan", "show", "@small", "--plna", "x"], ["--plna", "did you mean --plan?"]),
    "missing file": (["plan", "show", "@tmp/none.json"], ["none.json", "cannot be read", "No such file"]),
    "folder without a plan": (["plan", "show", "@root"], ["has no pruning_plan.json"]),
    "one is missing": (["plan", "diff", "@small", "@tmp/none"], ["none", "cannot be read"]),
    "no JSON": (["plan", "show", "@small/model.safetensors"], ["pruning plan", "model.safetensors"]),
    "other JSON": (["plan", "diff", "@small", "@small/config.json"], ["config.json", "not a plan"]),
    "no base": (["plan", "apply", "@small", "--output", "@tmp/out"], ["prune.model is not set"]),
    "other architecture": (
        ["plan", "apply", "@small", "--model", "timm/test_vit", "--prune.pretrained", "false", *IGNORE],
        ["pruning plan", "patch_embed.proj|blocks"],
    ),
    "output that exists": (
        ["plan", "apply", "@small", "--model", NAME, *OPEN, "--output", "@small"],
        ["--output", "exists"],
    ),
}


@pytest.mark.parametrize("kind", BAD_INPUT)
def test_bad_input_is_one_line_and_changes_nothing(kind: str, folders: Path, tmp_path: Path) -> None:
    check_refused(*BAD_INPUT[kind], folders, tmp_path)


EDITS = {
    "unknown group": (lambda plan: plan["kept"].update({"blocks.8.mlp.fc1": [0]}), "no group 'blocks.8.mlp.fc1'"),
    "out of range": (lambda plan: plan["kept"]["blocks.0.mlp.fc1"].append(128), "from 0 to 127"),
    "not ascending": (lambda plan: plan["kept"]["blocks.0.mlp.fc1"].reverse(), "must be ascending"),
    "uneven heads": (lambda plan: plan["kept"]["blocks.0.attn"].pop(), "same number of dims"),
    "version": (lambda plan: plan.update(version=2), "version 2"),
}


@pytest.mark.parametrize("kind", EDITS)
def test_invalid_edit_of_plan_writes_nothing(kind: str, folders: Path, tmp_path: Path) -> None:
    edit, words = EDITS[kind]
    plan = read(folders / "small", "pruning_plan.json")
    edit(plan)
    (tmp_path / "plan.json").write_text(json.dumps(plan))
    line = refuse("plan", "apply", tmp_path / "plan.json", "--model", NAME, *OPEN, "--output", tmp_path / "out")
    assert words in line
    assert [path.name for path in tmp_path.iterdir()] == ["plan.json"]


def test_help_of_plan_names_actions() -> None:
    printed = succeed("plan", "--help")
    assert printed.startswith("usage: isoprune plan ACTION")
    assert all(re.search(rf"^    {action} +\S", printed, re.MULTILINE) for action in ("show", "diff", "apply"))


def test_cost_is_foretold_before_a_cut(tmp_path: Path) -> None:
    flags = ["--prune.model", NAME, *OPEN, "--data.dataset", "digits", "--prune.target_macs", "50%"]
    sample = ["--prune.calibration_batches", "5", "--prune.batch_size", "20", "--data.eval_images", "30"]
    shown = succeed("plan", "cost", *flags, *sample)
    assert re.search(r"^score +5\.1 +- +[\d.]+ s$", shown, re.MULTILINE)
    assert re.search(r"^evaluate +0\.5 +- +[\d.]+ s$", shown, re.MULTILINE)  # 30 of 100 images, by 1 + 1/2 models
    assert "a forward pass of the base over 100 images" in shown
    assert [*tmp_path.iterdir()] == []
