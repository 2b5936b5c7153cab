"""The stages that look at plans and folders, as a user meets them."""

import json
import re
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest
import torch
from helpers.command_line import contents, isoprune, leftovers, read, refuse, succeed
from safetensors.torch import load_file, save_file
from torch import nn

from isoprune_hf.checkpoint.modeling_isoprune import IsoPruneForImageClassification
from isoprune_hf.models import load_base
from isoprune_hf.pruning.cost.macs import cost_model
from isoprune_hf.pruning.deciding.make_plan import make_plan
from isoprune_hf.pruning.graph.find_groups import TracedGroups, trace_groups
from isoprune_hf.pruning.plan import PruningPlan
from isoprune_hf.pruning.scoring.scores import score_groups
from isoprune_hf.recipes import PruneRecipe

MODEL_ARGS = {"img_size": 16, "patch_size": 4, "embed_dim": 32, "depth": 2, "num_heads": 4}
NAME = "timm/vit_tiny_patch16_224"
OPEN = ["--prune.pretrained", "false", "--prune.model_args", json.dumps(MODEL_ARGS), "--prune.num_labels", "10"]
CUT = ["--prune.model", NAME, *OPEN, "--prune.criterion", "l1", "--prune.head_ratio", "0.25", "--prune.round_to", "4"]


@pytest.fixture(scope="module", autouse=True)
def on_the_cpu() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ACCELERATE_USE_CPU", "true")
        yield


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two cuts of one base, `small` and `large`, and one of another base, `other`."""
    root = tmp_path_factory.mktemp("folders")
    succeed("prune", *CUT, "--output", root / "small")
    succeed("prune", *CUT, "--prune.target_macs", "60%", "--output", root / "large")
    succeed("prune", *CUT, "--prune.seed", "7", "--output", root / "other")
    return root


# What several ways to decide would cut


def open_dense() -> tuple[IsoPruneForImageClassification, TracedGroups]:
    model = load_base(NAME, False, model_args=MODEL_ARGS, num_labels=10).model
    return model, trace_groups(model)


def widths_of(printed: str, names: Iterable[str]) -> dict[str, list[str]]:
    """Cells of the table of groups, from its columns."""
    found = {line.split()[0]: re.split(r"  +", line)[2:] for line in printed.splitlines() if line.split()[:1]}
    return {name: found[name] for name in names}


@pytest.mark.parametrize("given", ["name", "folder", "scores"])
def test_inspect_compares_plans_that_are_made_directly(given: str, folders: Path, tmp_path: Path) -> None:
    model, groups = open_dense()
    scores, cost = score_groups(model, groups, criterion="l1"), cost_model(model, groups)
    page = tmp_path / "page.html"
    arguments = ["inspect", folders / "large" if given == "folder" else NAME, "--html", page, "--prune.round_to", "4"]
    arguments += ["--prune.head_ratio", "0.25"]
    if given == "scores":
        scores.save(tmp_path / "scores.safetensors")
        arguments += [*OPEN, "--scores", tmp_path / "scores.safetensors"]
    elif given == "name":
        arguments += [*OPEN, "--prune.criterion", "l1"]
    else:
        arguments += ["--prune.criterion", "l1"]
    printed = succeed(*arguments)
    # A folder is compared at the MACs of its own plan, which is the first column.
    own = PruningPlan.load(folders / "large") if given == "folder" else None
    target = "50%" if own is None else own.achieved["pruned"]["macs"]
    plans = [] if own is None else [own]
    for scope in ("local", "global", "isomorphic"):
        recipe = PruneRecipe(criterion="l1", scope=scope, target_macs=target, round_to=4, head_ratio=0.25)
        plans.append(make_plan(groups, scores, recipe, cost=cost))
    cells = widths_of(printed, [group.name for group in groups])
    for group in groups:
        expected = []
        for plan in plans:
            kept, heads = (
                len(plan.kept.get(group.name, range(group.channels))),
                len(plan.heads.get(group.name, "4444")),
            )
            expected.append(f"{heads} x {kept // heads}" if group.num_heads else str(kept))
        assert cells[group.name][-len(plans) :] == expected
        assert group.name in page.read_text()
    assert printed.endswith(f"page: {page}\n") and "no scores" not in printed


def test_inspect_scores_from_images(tmp_path: Path) -> None:
    data = ["--data.dataset", "digits", "--prune.calibration_batches", "1", "--prune.batch_size", "4"]
    printed = succeed("inspect", NAME, *OPEN, *data, "--prune.target_macs", "80%", "--prune.round_to", "1")
    assert "scores by gate_fisher_joint\n" in printed and ", 80.0% of the base\n" in printed


# Plans


def test_a_plan_is_shown_with_the_sizes_of_its_base_where_the_folder_is_there(folders: Path, tmp_path: Path) -> None:
    plan = read(folders / "small", "pruning_plan.json")
    kept, heads = len(plan["kept"]["blocks.0.attn"]), len(plan["heads"]["blocks.0.attn"])
    shown = succeed("plan", "show", folders / "small")
    assert re.search(rf"^blocks.0.attn +{kept} of 32 +\d+% +{heads} of 4 +{kept // heads} of 8$", shown, re.MULTILINE)
    assert re.search(r"^blocks.0.mlp.fc1 +\d+ of 128 +\d+%$", shown, re.MULTILINE)
    assert "criterion l1" in shown and plan["fingerprint"][:12] in shown
    file = shutil.copy(folders / "small" / "pruning_plan.json", tmp_path / "plan.json")
    alone = succeed("plan", "show", "--plan", file)
    assert re.search(rf"^blocks.0.attn +{kept} +{heads} +{kept // heads}$", alone, re.MULTILINE)
    assert " of 32" not in alone


def test_a_plan_can_be_shown_where_the_model_cannot_be_opened(folders: Path, tmp_path: Path) -> None:
    broken = shutil.copytree(folders / "small", tmp_path / "broken")
    (broken / "model.safetensors").write_bytes(b"broken")
    assert "blocks.0.attn" in succeed("plan", "show", broken)


def test_a_difference_ends_with_1_and_equal_plans_with_0(folders: Path) -> None:
    small, large = folders / "small", folders / "large"
    same = isoprune("plan", "diff", small, small / "pruning_plan.json")
    assert (same.code, same.out, same.err) == (0, "the plans are equal\n", "")
    different = isoprune("plan", "diff", small, large)
    assert (different.code, different.err) == (1, "")
    assert f"A: {small}\nB: {large}\n" in different.out and "settings.target_macs" in different.out
    assert isoprune("plan", "diff", "--second", large, "--first", small) == different


@pytest.mark.parametrize("given", ["folder", "file", "recipe"])
def test_a_replay_writes_the_folder_of_the_cut_again(given: str, folders: Path, tmp_path: Path) -> None:
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


def test_a_plan_of_another_base_is_refused_unless_told_otherwise(folders: Path, tmp_path: Path) -> None:
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
    "unknown flag": (["plan", "show", "@small", "--plna", "x"], ["--plna", "did you mean plan?"]),
    "missing file": (["plan", "show", "@tmp/none.json"], ["none.json", "cannot be read", "No such file"]),
    "folder without a plan": (["plan", "show", "@root"], ["holds no pruning_plan.json"]),
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
    "no model": (["inspect"], ["inspect needs a model"]),
    "page that exists": (["inspect", NAME, "--html", "@small/README.md"], ["--html", "README.md exists"]),
    "picture that exists": (["inspect", NAME, "--output", "@small/README.md"], ["--output", "README.md exists"]),
    "budget that is not MACs": (
        ["inspect", NAME, *OPEN, "--prune.target_params", "50%"],
        ["give prune.target_macs, not prune.target_params"],
    ),
    "budget out of reach": (
        ["inspect", NAME, *OPEN, "--prune.criterion", "l1", "--prune.target_macs", "1%"],
        ["target_macs", "cannot be reached"],
    ),
    "plan of other weights": (
        ["inspect", "@mixed", "--prune.criterion", "l1"],
        ["was made on other weights than those of timm/vit_tiny"],
    ),
    "no folder": (["doctor"], ["required", "folder"]),
    "missing folder": (["doctor", "@tmp/none"], ["--folder", "none", "no folder of a pruned model"]),
    "folder of nothing": (["doctor", "@root"], ["--folder", "no folder of a pruned model"]),
    "unknown base": (["doctor", "@small", "--base", "timm/no_such_vit"], ["no model", "no_such_vit"]),
    "no folder of a base": (["doctor", "@small", "--base", "@tmp/none"], ["no folder", "none"]),
}


@pytest.mark.parametrize("kind", BAD_INPUT)
def test_bad_input_is_one_line_and_changes_nothing(kind: str, folders: Path, tmp_path: Path) -> None:
    arguments, words = BAD_INPUT[kind]
    for name, place in {"@tmp": tmp_path, "@root": folders, "@small": folders / "small"}.items():
        arguments = [argument.replace(name, str(place)) for argument in arguments]
    if "@mixed" in arguments:
        mixed = shutil.copytree(folders / "small", tmp_path / "mixed")
        shutil.copy(folders / "other" / "pruning_plan.json", mixed)
        arguments = [argument.replace("@mixed", str(mixed)) for argument in arguments]
    before, ours = contents(folders), contents(tmp_path)
    line = refuse(*arguments)
    assert [word for word in words if not re.search(word, line)] == [], line
    assert contents(tmp_path) == ours and contents(folders) == before


EDITS = {
    "unknown group": (lambda plan: plan["kept"].update({"blocks.8.mlp.fc1": [0]}), "no group 'blocks.8.mlp.fc1'"),
    "out of range": (lambda plan: plan["kept"]["blocks.0.mlp.fc1"].append(128), "from 0 to 127"),
    "not ascending": (lambda plan: plan["kept"]["blocks.0.mlp.fc1"].reverse(), "must be ascending"),
    "uneven heads": (lambda plan: plan["kept"]["blocks.0.attn"].pop(), "same number of dims"),
    "version": (lambda plan: plan.update(version=2), "version 2"),
}


@pytest.mark.parametrize("kind", EDITS)
def test_a_plan_edited_wrongly_writes_nothing(kind: str, folders: Path, tmp_path: Path) -> None:
    edit, words = EDITS[kind]
    plan = read(folders / "small", "pruning_plan.json")
    edit(plan)
    (tmp_path / "plan.json").write_text(json.dumps(plan))
    line = refuse("plan", "apply", tmp_path / "plan.json", "--model", NAME, *OPEN, "--output", tmp_path / "out")
    assert words in line
    assert [path.name for path in tmp_path.iterdir()] == ["plan.json"]


def test_the_help_of_plan_names_its_actions() -> None:
    printed = succeed("plan", "--help")
    assert printed.startswith("usage: isoprune plan ACTION")
    assert all(re.search(rf"^    {action} +\S", printed, re.MULTILINE) for action in ("show", "diff", "apply"))


# The doctor


def verdicts(printed: str) -> dict[str, str]:
    return {check: verdict for verdict, check in re.findall(r"^(ok|FAIL|skip) +(\S+)", printed, re.MULTILINE)}


SOUND = dict.fromkeys(["load", "cost", "structure", "no-op", "save-load", "reach", "tensors"], "ok")


def test_a_sound_folder_passes_and_is_left_alone(folders: Path) -> None:
    before = contents(folders)
    printed = succeed("doctor", folders / "small")
    assert verdicts(printed) == SOUND
    assert printed.endswith(f"{folders}/small: no checks failed\n")
    assert re.search(r"^ {17}fixed: outputs of the classifier: head.weight, head.bias$", printed, re.MULTILINE)
    assert contents(folders) == before and leftovers(folders) == []


def test_a_tensor_that_was_changed_is_named(folders: Path, tmp_path: Path) -> None:
    harmed = shutil.copytree(folders / "small", tmp_path / "harmed")
    tensors = load_file(harmed / "model.safetensors")
    tensors["model.blocks.1.mlp.fc2.bias"][3] += 1e-3
    save_file(tensors, harmed / "model.safetensors", metadata={"format": "pt"})
    done = isoprune("doctor", harmed)
    assert (done.code, done.err) == (1, "")
    assert verdicts(done.out) == {**SOUND, "tensors": "FAIL"}
    assert "blocks.1.mlp.fc2.bias is not that of the base" in done.out
    assert f"{harmed}: 1 check failed" in done.out


def test_the_base_may_have_moved_and_another_one_is_no_base(folders: Path, tmp_path: Path) -> None:
    moved = shutil.copytree(folders / "small", tmp_path / "moved")
    config = read(moved, "config.json")
    base = load_base(NAME, False, model_args=MODEL_ARGS, num_labels=10)
    base.model.save_pretrained(tmp_path / "base")
    base.processor.save_pretrained(tmp_path / "base")
    config["source"] |= {"name": str(tmp_path / "gone"), "pretrained": True, "model_args": {}}
    (moved / "config.json").write_text(json.dumps(config))
    gone = isoprune("doctor", moved)
    assert gone.code == 0 and verdicts(gone.out) == {**SOUND, "tensors": "skip"}
    assert re.search(r"^skip  tensors .*no folder", gone.out, re.MULTILINE)
    assert verdicts(succeed("doctor", moved, "--base", tmp_path / "base")) == SOUND
    with torch.no_grad():
        base.model.model.head.bias += 1
    base.model.save_pretrained(tmp_path / "base")
    other = isoprune("doctor", moved, "--base", tmp_path / "base")
    assert other.code == 1 and verdicts(other.out) == {**SOUND, "tensors": "FAIL"}
    assert "has other weights than the one that was cut" in other.out


def test_a_plan_that_is_not_the_models_or_not_readable_is_found(folders: Path, tmp_path: Path) -> None:
    mixed = shutil.copytree(folders / "small", tmp_path / "mixed")
    shutil.copy(folders / "large" / "pruning_plan.json", mixed)
    done = isoprune("doctor", mixed)
    assert done.code == 1 and verdicts(done.out) == {**SOUND, "structure": "FAIL", "tensors": "FAIL"}
    (mixed / "pruning_plan.json").write_text("{")
    done = isoprune("doctor", mixed)
    assert done.code == 1
    assert verdicts(done.out) == {**SOUND, "plan": "FAIL", "structure": "skip", "tensors": "skip"}


def test_a_folder_that_does_not_load_fails_and_says_why(folders: Path, tmp_path: Path) -> None:
    broken = shutil.copytree(folders / "small", tmp_path / "broken")
    (broken / "model.safetensors").write_bytes((broken / "model.safetensors").read_bytes()[:-100])
    done = isoprune("doctor", broken)
    assert (done.code, done.err) == (1, "")
    assert verdicts(done.out) == {"load": "FAIL"} and "safetensors" in done.out
    shutil.copy(folders / "small" / "model.safetensors", broken)
    (broken / "preprocessor_config.json").unlink()
    done = isoprune("doctor", broken)
    assert done.code == 1 and verdicts(done.out) == {"load": "FAIL"}


def test_trained_weights_are_not_compared_with_the_base(folders: Path, tmp_path: Path) -> None:
    trained = tmp_path / "trained"
    opened = load_base(str(folders / "small"))
    nn.init.normal_(opened.model.model.head.weight)
    opened.model.config.stage = "finetuned"
    opened.model.save_pretrained(trained)
    opened.processor.save_pretrained(trained)
    shutil.copy(folders / "small" / "pruning_plan.json", trained)
    printed = succeed("doctor", trained)
    assert verdicts(printed) == {**SOUND, "tensors": "skip"}
    assert "the weights were trained after the cut" in printed
