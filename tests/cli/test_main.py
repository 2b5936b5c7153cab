"""Files that the stages write, text that they print, and input that they refuse."""

import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from helpers.command_line import Done, contents, isoprune, read, refuse, succeed
from helpers.evaluation import calibration_error_by_hand, numbers_of
from helpers.imagenet import SYNSETS
from helpers.imagenet_cut import MODEL_ARGS, TAYLOR, VIT
from helpers.plain_cut import PLAIN_FLAGS
from helpers.ranks import run
from PIL import Image
from torch import nn
from transformers import AutoImageProcessor, AutoModelForImageClassification, pipeline

import isoprune_hf
from isoprune_hf.cli.parser import EMBEDDED_RECIPE
from isoprune_hf.cli.table import SECTIONS, STAGES

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.usefixtures("offline_cpu")

L1 = [*VIT, "--prune.criterion", "l1"]
PRUNED_FILES = {"README.md", "config.json", "model.safetensors", "modeling_isoprune.py"}
PRUNED_FILES |= {"preprocessor_config.json", "pruning_plan.json", "widths.png"}
PERCENT = {"top1": "top-1 %", "top5": "top-5 %", "ece": "calibration error %"}
FIGURES = {"top1", "top5", "loss", "ece", "images", "data", "split"}
RECIPE = {
    "prune": {
        "model": "timm/vit_tiny_patch16_224",
        "pretrained": False,
        "model_args": MODEL_ARGS,
        "num_labels": "data",
        "target_macs": "50%",
        "calibration_batches": 2,
    },
    "data": {"dataset": "digits"},
    "pretrain": {"epochs": 1},
    "finetune": {"epochs": 1},
}


def logits_of(folder: Path) -> torch.Tensor:
    """Return the logits of the model in a folder for two fixed images: (2, 10)."""
    model = AutoModelForImageClassification.from_pretrained(folder).eval()
    with torch.no_grad():
        return model(torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))).logits


def evaluate_by_hand(folder: Path, images: Path) -> dict[str, float]:
    """Classify the files of val/ one by one with the model in a folder, and return the figures."""
    model = AutoModelForImageClassification.from_pretrained(folder).eval()
    processor = AutoImageProcessor.from_pretrained(folder)
    ranks, losses, confidences = [], [], []
    for file in sorted((images / "val").glob("*/*.JPEG")):
        label = SYNSETS.index(file.parent.name)
        with torch.no_grad():
            logits = model(**processor(Image.open(file), return_tensors="pt")).logits
        confidences.append(float(logits[0].softmax(dim=0).max()))
        ranks.append(int((logits[0] > logits[0, label]).sum()))
        losses.append(float(nn.functional.cross_entropy(logits, torch.tensor([label]))))
    share = {f"top{k}": sum(rank < k for rank in ranks) / len(ranks) for k in (1, 5)}
    share["ece"] = calibration_error_by_hand(confidences, [rank == 0 for rank in ranks])
    return {**share, "loss": sum(losses) / len(losses), "images": len(ranks)}


@pytest.fixture(scope="module")
def recipe_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Recipe file with all four sections and the flags of `run`."""
    file = tmp_path_factory.mktemp("recipe") / "recipe.yaml"
    file.write_text(yaml.safe_dump({**RECIPE, "output": "nowhere", "overwrite": False}))
    return file


# What the stages write


def test_half_of_macs_leaves_without_data(tmp_path: Path) -> None:
    out = tmp_path / "out"
    printed = succeed("prune", *L1, "--prune.target_macs", "50%", "--output", out)
    assert {path.name for path in out.iterdir()} == PRUNED_FILES
    config = read(out, "config.json")
    cost = config["cost"]
    assert set(cost) == {"base", "pruned"} and all(set(size) == {"macs", "params"} for size in cost.values())
    half = cost["base"]["macs"] / 2
    assert 0.95 * half <= cost["pruned"]["macs"] <= half
    assert set(config["structure"]) == {"shapes", "attributes", "removed"} and config["structure"]["shapes"]
    assert config["stage"] == "pruned"
    plan = read(out, "pruning_plan.json")
    assert plan["achieved"] == cost and plan["settings"]["criterion"] == "l1"
    model = AutoModelForImageClassification.from_pretrained(out)
    assert sum(parameter.numel() for parameter in model.parameters()) == cost["pruned"]["params"]
    # By hand, the patch embedding of the base: 32 filters of 3 x 4 x 4 at 16 places; the head: 1000 classes.
    assert cost["base"]["macs"] > 32 * 48 * 16 + 32 * 1000
    assert re.findall(r"^(\w+) +0\.\d+ .* M$", printed, re.MULTILINE) == ["base", "pruned"]
    assert f'model="{out}"' in printed
    assert (out / "README.md").read_text().startswith("---\n")


def test_cut_with_data_is_evaluated_twice(cut_folder: Path, images: Path) -> None:
    assert {path.name for path in cut_folder.iterdir()} == PRUNED_FILES | {"metrics.json"}
    metrics, config = read(cut_folder, "metrics.json"), read(cut_folder, "config.json")
    assert set(metrics) == {"base", "pruned"} and all(set(figures) == FIGURES for figures in metrics.values())
    assert numbers_of(metrics["pruned"]) == pytest.approx(evaluate_by_hand(cut_folder, images), rel=1e-5)
    assert [config["id2label"][str(index)] for index in range(10)] == SYNSETS
    assert config["recipe"]["data"]["dataset"] == str(images)
    assert read(cut_folder, "pruning_plan.json")["settings"]["sample"]["images"] == 39


def test_evaluate_prints_and_stores_figures(cut_folder: Path, images: Path, tmp_path: Path) -> None:
    out = shutil.copytree(cut_folder, tmp_path / "out")
    metrics = read(out, "metrics.json")
    wrong = {"top1": 1.0, "top5": 1.0, "loss": 0.0, "images": 1}
    (out / "metrics.json").write_text(json.dumps({**metrics, "pruned": wrong}))
    printed = succeed("evaluate", "--model", out, "--data.dataset", images)
    size, start, heading, figures = printed.splitlines()
    params = read(out, "config.json")["cost"]["pruned"]["params"]
    assert re.fullmatch(rf"MACs: \d+\.\d+ G, Params: {params / 1e6:.4f} M", size)
    assert start == f"evaluate {out} on 20 images, transform: the model's own"
    by_hand = evaluate_by_hand(out, images)
    shown = dict(zip(re.split("  +", heading), re.split("  +", figures), strict=True))
    percent = {name: f"{100 * by_hand[key]:.2f}" for key, name in PERCENT.items()}
    assert {name: shown[name] for name in PERCENT.values()} == percent
    assert (shown["loss"], shown["images"]) == (f"{by_hand['loss']:.4f}", "20")
    stored = read(out, "metrics.json")
    assert stored["base"] == metrics["base"] and numbers_of(stored["pruned"]) == pytest.approx(by_hand, rel=1e-5)
    assert f"{100 * metrics['pruned']['top5']:.2f}" in (out / "README.md").read_text()


def test_evaluate_adds_figures_to_folder_without_any(images: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    succeed("prune", *L1, "--prune.num_labels", "10", "--output", out)
    before = logits_of(out)
    figures = json.loads(isoprune("evaluate", "--model", out, "--data.dataset", images, "--json").out)
    assert read(out, "metrics.json") == {"pruned": {name: figures[name] for name in FIGURES}}
    assert read(out, "config.json")["recipe"]["data"]["dataset"] == str(images)
    assert torch.equal(logits_of(out), before)


def test_finetune_writes_new_folder_with_all_figures(cut_folder: Path, images: Path, tmp_path: Path) -> None:
    out, before = tmp_path / "out", contents(cut_folder)
    printed = succeed(
        "finetune", "--model", cut_folder, "--data.dataset", images, "--finetune.epochs", "1", "--output", out
    )
    assert contents(cut_folder) == before
    assert {path.name for path in out.iterdir()} == PRUNED_FILES | {"metrics.json", "checkpoints"}
    metrics = read(out, "metrics.json")
    assert list(metrics) == ["base", "finetuned", "pruned"]
    for figures in metrics.values():
        assert set(figures) == FIGURES and figures["images"] == 20
        assert 0 <= figures["top1"] <= figures["top5"] <= 1
    assert {name: metrics[name] for name in ("base", "pruned")} == read(cut_folder, "metrics.json")
    assert numbers_of(metrics["finetuned"]) == pytest.approx(evaluate_by_hand(out, images), rel=1e-5)
    assert read(out, "config.json")["stage"] == "finetuned"
    assert read(out, "config.json")["structure"] == read(cut_folder, "config.json")["structure"]
    assert (out / "pruning_plan.json").read_bytes() == (cut_folder / "pruning_plan.json").read_bytes()
    assert not torch.equal(logits_of(out), logits_of(cut_folder))
    for name in ("last", "best"):  # after one epoch, both are the result
        assert torch.equal(logits_of(out / "checkpoints" / name), logits_of(out))
    for name in ("base", "pruned", "finetuned"):
        assert re.search(rf"^{name} .*{100 * metrics[name]['top1']:.2f}", printed, re.MULTILINE)


def test_dense_model_can_be_finetuned(images: Path, tmp_path: Path) -> None:
    base, out = tmp_path / "base", tmp_path / "out"
    opened = isoprune_hf.load_base(VIT[1], False, model_args=MODEL_ARGS, num_labels=10, label_names=tuple(SYNSETS))
    opened.model.save_pretrained(base)
    opened.processor.save_pretrained(base)
    succeed("finetune", "--model", base, "--data.dataset", images, "--finetune.epochs", "1", "--output", out)
    assert not torch.equal(logits_of(out), logits_of(base))


@pytest.mark.parametrize("stage", ["pruned", "base"])
def test_inspect_lists_and_draws_isomorphic_classes(stage: str, cut_folder: Path, tmp_path: Path) -> None:
    picture = tmp_path / "new" / "classes.png"
    model = cut_folder if stage == "pruned" else "timm/test_vit"
    printed = succeed("inspect", "--model", model, "--output", picture)
    lines = re.findall(r"^ +(\d+)  \S+ +(\d+) +(\d+)  [\dx ]+?(?: +(\d+)%)?$", printed, re.MULTILINE)
    rows = [tuple(int(number or 100) for number in line) for line in lines]
    assert "no scores, so nothing is compared: criterion trial_loss needs --data.dataset" in printed
    if stage == "pruned":
        # Of two blocks: the stream, the attentions (32 dims each) and the MLPs (128 hidden channels each).
        assert "5 coupled groups in 3 isomorphic classes" in printed
        kept = read(cut_folder, "pruning_plan.json")["kept"]
        dims, hidden = ([kept[f"blocks.{block}.{name}"] for block in (0, 1)] for name in ("attn", "mlp.fc1"))
        shares = {
            (1, 32): len(kept["patch_embed.proj"]) / 32,
            (2, 64): sum(map(len, dims)) / 64,
            (2, 256): sum(map(len, hidden)) / 256,
        }
        assert {row[1:3]: row[3] for row in rows} == {row: round(100 * share) for row, share in shares.items()}
    else:
        assert [row[1:] for row in rows] == [(1, 64, 100), (6, 6 * 64, 100), (6, 6 * 192, 100)]
    assert picture.read_bytes().startswith(b"\x89PNG\r\n")
    with Image.open(picture) as opened:
        assert opened.width > 500 and len(opened.convert("RGB").getcolors(2**24)) > 10


def test_run_writes_every_result(
    recipe_file: Path, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("isoprune_hf.measuring.timing.find_load", lambda passes, on_cpu: None)
    out = tmp_path / "out"
    command = ["run", "--config", recipe_file, "--data.dataset", images, "--output", out]
    printed = succeed(*command)
    assert {path.name for path in out.iterdir()} == {"base", "model", "checkpoints", "importance.safetensors"}
    assert {path.name for path in (out / "model").iterdir()} == PRUNED_FILES | {"metrics.json", "speed.json"}
    assert {path.name for path in (out / "checkpoints").iterdir()} == {"last", "best", "training"}
    metrics, config = read(out / "model", "metrics.json"), read(out / "model", "config.json")
    assert set(metrics) == set(read(out / "model", "speed.json")["milliseconds"]) == {"base", "pruned", "finetuned"}
    assert all(set(figures) == FIGURES and figures["images"] == 20 for figures in metrics.values())
    assert 0.95 <= 2 * config["cost"]["pruned"]["macs"] / config["cost"]["base"]["macs"] <= 1
    assert (config["stage"], config["source"]["name"]) == ("finetuned", str(out / "base"))
    assert read(out / "base", "config.json")["stage"] == "base"
    assert logits_of(out / "base").shape == logits_of(out / "model").shape == (2, 10)
    for name in metrics:
        assert re.search(rf"^{name} .*{100 * metrics[name]['top1']:.2f}", printed, re.MULTILINE)
        assert f"| {name} |" in (out / "model" / "README.md").read_text()
    assert re.search(r"^pipeline on a held-out image: n\d+ \(0\.\d\d\), truth n\d+$", printed, re.MULTILINE)
    before = contents(out)
    assert "--overwrite true" in refuse(*command)
    assert contents(out) == before


# Recipe files, flags and scores


@pytest.mark.families
def test_one_recipe_file_serves_several_stages(recipe_file: Path, images: Path, tmp_path: Path) -> None:
    scores, direct, from_file, flag = (tmp_path / name for name in ("importance.safetensors", "a", "b", "c"))
    recipe = ["--config", recipe_file, "--data.dataset", images]
    succeed("score", *recipe, "--output", scores)
    succeed("prune", *recipe, "--output", direct)
    succeed("prune", *recipe, "--scores", scores, "--output", from_file)
    assert (from_file / "pruning_plan.json").read_bytes() == (direct / "pruning_plan.json").read_bytes()
    plan = read(direct, "pruning_plan.json")["settings"]
    assert plan["target_macs"] == "50%" and plan["sample"]["images"] == 40
    succeed("prune", *recipe, "--scores", scores, "--prune.target_macs", "70%", "--output", flag)
    cost = read(flag, "config.json")["cost"]
    assert read(flag, "pruning_plan.json")["settings"]["target_macs"] == "70%"
    assert 0.66 <= cost["pruned"]["macs"] / cost["base"]["macs"] <= 0.7


@pytest.mark.parametrize("flag_first", [False, True])
def test_flag_overrides_file_on_either_side(flag_first: bool, recipe_file: Path) -> None:
    parts = [["--config", recipe_file], ["--prune.ratio", "0.25", "--prune.target_macs", "70%"]]
    first, second = reversed(parts) if flag_first else parts
    shown = yaml.safe_load(succeed("prune", *first, *second, "--print_config"))
    assert (shown["prune"]["ratio"], shown["prune"]["target_macs"]) == (0.25, "70%")
    assert shown["prune"]["calibration_batches"] == 2


def test_printed_config_gives_same_plan(cut_folder: Path, images: Path, tmp_path: Path) -> None:
    printed = succeed("prune", *TAYLOR, "--data.dataset", images, "--print_config")
    (tmp_path / "recipe.yaml").write_text(printed)
    succeed("prune", "--config", tmp_path / "recipe.yaml", "--output", tmp_path / "out")
    plan = (tmp_path / "out" / "pruning_plan.json").read_bytes()
    assert plan == (cut_folder / "pruning_plan.json").read_bytes()
    assert yaml.safe_load(printed)["prune"]["batch_size"] == 3


@pytest.mark.parametrize(
    "error",
    [torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("[...] DefaultCPUAllocator: x"), MemoryError()],
)
def test_out_of_memory_is_one_line(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    def run_prune(*args: object, **values: object) -> None:
        raise error

    monkeypatch.setitem(STAGES, "prune", replace(STAGES["prune"], run=run_prune))
    done = isoprune("prune", *L1)
    assert done.code == 71
    assert re.fullmatch(r"isoprune: error: out of memory; [^\n]*--prune\.batch_size[^\n]*\n", done.err)


@pytest.mark.families
def test_paths_may_have_spaces_unicode_and_links(cut_folder: Path, images: Path, tmp_path: Path) -> None:
    place = tmp_path / ("ein Ordner, größer als \N{SNOWMAN} und 'quoted' " + "x" * 120)
    (place / "real").mkdir(parents=True)
    (place / "link").symlink_to(place / "real")
    shutil.copytree(cut_folder, place / "mein Modell")
    shutil.copytree(images, place / "meine Bilder")
    given = ["--model", place / "mein Modell", "--data.dataset", place / "meine Bilder", "--finetune.epochs", "1"]
    out = place / "link" / "aus gabe"
    assert str(out) in succeed("finetune", *given, "--output", out)
    assert pipeline("image-classification", model=str(out))(Image.new("RGB", (20, 30)))[0]["score"] > 0
    assert "top-1 %" in succeed("evaluate", "--model", out, "--data.dataset", place / "meine Bilder")
    assert "no checks failed" in succeed("doctor", out)


def test_embedded_recipe_runs_without_arguments() -> None:
    embedded = yaml.safe_load(EMBEDDED_RECIPE.read_text(encoding="utf-8"))
    shown = yaml.safe_load(succeed("--print_config"))
    for section in SECTIONS:
        assert embedded[section].items() <= shown[section].items()
    assert (shown["output"], shown["overwrite"]) == (embedded["output"], embedded["overwrite"])
    assert yaml.safe_load(succeed("--print_config", "--prune.ratio", "0.25"))["prune"]["ratio"] == 0.25


def test_given_base_starts_from_defaults() -> None:
    shown = yaml.safe_load(succeed("run", *L1, "--print_config"))
    assert shown["data"]["dataset"] is None and shown["prune"]["target_macs"] is None
    assert shown["pretrain"]["epochs"] == 0 and shown["finetune"]["epochs"] == 30


def test_cut_from_scores_needs_no_data(cut_folder: Path, images: Path, tmp_path: Path) -> None:
    succeed("score", *TAYLOR, "--data.dataset", images, "--output", tmp_path / "scores.safetensors")
    ten = [*VIT, *PLAIN_FLAGS, "--prune.num_labels", "10", "--scores", tmp_path / "scores.safetensors"]
    succeed("prune", *ten, "--output", tmp_path / "out")
    assert (tmp_path / "out" / "pruning_plan.json").read_bytes() == (cut_folder / "pruning_plan.json").read_bytes()


def test_cut_from_scores_records_their_criterion(images: Path, tmp_path: Path) -> None:
    ten = ["--prune.num_labels", "10"]
    succeed("score", *L1, *ten, "--output", tmp_path / "scores.safetensors")
    arguments = [*VIT, *ten, "--data.dataset", images, "--scores", tmp_path / "scores.safetensors"]
    succeed("prune", *arguments, "--output", tmp_path / "out")
    assert read(tmp_path / "out", "pruning_plan.json")["settings"]["criterion"] == "l1"
    assert read(tmp_path / "out", "config.json")["recipe"]["prune"]["criterion"] == "l1"
    assert "| criterion | l1 |" in (tmp_path / "out" / "README.md").read_text()


def test_scores_file_has_default_permissions(tmp_path: Path) -> None:
    succeed("score", *L1, "--output", tmp_path / "scores.safetensors")
    (tmp_path / "plain").write_text("")
    assert (tmp_path / "scores.safetensors").stat().st_mode == (tmp_path / "plain").stat().st_mode


@pytest.mark.parametrize("stage", ["prune", "run"])
def test_overwriting_removes_older_result(stage: str, images: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    for name in ("base", "model", "checkpoints/best"):
        (out / name).mkdir(parents=True)
        (out / name / "config.json").write_text("of another model")
    if stage == "prune":
        succeed("prune", *L1, "--overwrite", "true", "--output", out)
        assert {path.name for path in out.iterdir()} == PRUNED_FILES
    else:
        untrained = ["--finetune.epochs", "0", "--data.dataset", images]
        succeed("run", *TAYLOR, *untrained, "--overwrite", "true", "--output", out)
        assert {path.name for path in out.iterdir()} == {"model", "importance.safetensors"}
        assert read(out / "model", "config.json")["stage"] == "pruned"


# Help


@pytest.mark.parametrize("stage", STAGES)
def test_stage_help_names_every_flag(stage: str) -> None:
    declared = STAGES[stage]
    printed = succeed(*stage.split(), "--help-all")
    positional = [name.rpartition(".")[2].upper() for name in declared.positional]
    assert printed.startswith(f"usage: {' '.join(['isoprune', stage, *positional])} ")
    expected = ["--config", "--print_config"] if declared.sections else []
    expected += [f"--{flag.name}" for flag in declared.flags]
    expected += [f"--{name}.{field.name}" for name in declared.sections for field in fields(SECTIONS[name])]
    assert [flag for flag in expected if not re.search(rf"^  {re.escape(flag)}\b", printed, re.MULTILINE)] == []
    assert " ".join(declared.text.split()) in " ".join(printed.split())


@pytest.mark.parametrize("is_fresh", [False, pytest.param(True, marks=pytest.mark.faults)])
def test_closed_pipe_ends_command_quietly(is_fresh: bool, tmp_path: Path) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    command = ["inspect", "timm/resnet18", "--prune.pretrained", "false"]
    try:
        if is_fresh:
            line = [sys.executable, "-m", "isoprune_hf", *command]
            done = subprocess.run(line, stdout=writer, stderr=subprocess.PIPE, text=True)
            ended = (done.returncode, done.stderr)
        else:
            code, _, err = run(command, tmp_path / "log", before=lambda: os.dup2(writer, 1))
            ended = (code, err)
    finally:
        os.close(writer)
    assert ended == (141, "")


def test_help_names_stages_and_version_matches() -> None:
    for flag in ("--help", "-h"):
        printed = succeed(flag)
        assert all(re.search(rf"^    {stage.split()[0]}\s+\S", printed, re.MULTILINE) for stage in STAGES)
    assert succeed("--version") == f"isoprune {isoprune_hf.__version__}\n"


# What is refused

HALF = ["--prune.target_macs", "50%"]
OUT = ["--output", "@tmp/out"]
BAD_INPUT: dict[str, tuple[list[str], list[str]]] = {
    "unknown stage": (["pruen"], ["unknown stage 'pruen'", "did you mean prune?"]),
    "unknown flag": (
        ["prune", *L1, "--prune.ciretrion", "l1", *OUT],
        ["--prune.ciretrion", "did you mean --prune.criterion?"],
    ),
    "unknown plain flag": (["evaluate", "--mdoel", "@pruned"], ["--mdoel", "did you mean --model?"]),
    "flag of another stage": (["prune", *L1, "--finetune.epochs", "1", *OUT], ["--finetune.epochs"]),
    "stray argument": (["evaluate", "--model", "@pruned", "stray"], ["stray"]),
    "missing flag": (["evaluate", "--data.dataset", "@images"], ["required", "model"]),
    "type": (["prune", *L1, "--prune.ratio", "many", *OUT], ["prune.ratio", "many"]),
    "no whole number": (["prune", *L1, "--prune.batch_size", "3.5", *OUT], ["prune.batch_size", "3.5"]),
    "choice": (["prune", *VIT, "--prune.criterion", "l3", *OUT], ["prune.criterion", "l3", "taylor", "random"]),
    "mapping": (["prune", *L1, "--prune.model_args", "3", *OUT], ["prune.model_args"]),
    "ratio": (["prune", *L1, "--prune.ratio", "1.5", *OUT], ["prune.ratio must be between 0 and 1, got 1.5"]),
    "no number": (["prune", *L1, "--prune.ratio", "nan", *OUT], ["prune.ratio", "nan"]),
    "batch size": (
        ["finetune", "--model", "@pruned", "--data.dataset", "@images", "--finetune.batch_size", "0", *OUT],
        ["finetune.batch_size must be a whole number between 1 and 16777216, got 0"],
    ),
    "small budget": (["prune", *L1, "--prune.target_macs", "1%", *OUT], ["cannot be reached", "the smallest is"]),
    "high floor": (["prune", *L1, *HALF, "--prune.min_keep", "9999", *OUT], ["cannot be reached", "min_keep 9999"]),
    "large budget": (["prune", *L1, "--prune.target_macs", "200%", *OUT], ["the base has only", "nothing to cut"]),
    "no budget": (["prune", *L1, "--prune.target_macs", "9X", *OUT], ["prune.target_macs must be a size", "'9X'"]),
    "unknown model": (
        ["prune", "--prune.model", "timm/vit_tinyy_patch16_224", "--prune.criterion", "l1", *OUT],
        ["no model", "vit_tinyy_patch16_224", "did you mean vit_tiny_patch16_224"],
    ),
    "missing model": (["evaluate", "--model", "@tmp/none", "--data.dataset", "@images"], ["does not exist", "none"]),
    "model that is not here": (
        ["prune", "--prune.model", "someone/none", "--prune.criterion", "l1", *OUT],
        ["'someone/none'", "could not be fetched", "--prune.pretrained false"],
    ),
    "data that are not here": (["prune", *TAYLOR, "--data.dataset", "someone/none", *OUT], ["'someone/none'"]),
    "argument of a model": (
        ["prune", *L1, "--prune.model_args", '{"depht": 2}', *OUT],
        ["cannot build", "depht"],
    ),
    "missing data": (["prune", *TAYLOR, "--data.dataset", "@tmp/none", *OUT], ["data.dataset", "none"]),
    "taylor without data": (
        ["prune", *VIT, "--prune.criterion", "taylor", *OUT],
        ["taylor needs data", "--data.dataset"],
    ),
    "rotation without data": (["prune", *L1, "--prune.rotate", "true", *OUT], ["prune.rotate needs data"]),
    "no training split": (
        ["prune", *TAYLOR, "--data.dataset", "@images", "--data.train_split", "none", *OUT],
        ["no training split", "data.train_split"],
    ),
    "labels without data": (["prune", *L1, "--prune.num_labels", "data", *OUT], ["needs data", "--data.dataset"]),
    "finetune without data": (["finetune", "--model", "@pruned", *OUT], ["data.dataset is not set"]),
    "split": (
        ["evaluate", "--model", "@pruned", "--data.dataset", "@images", "--data.eval_split", "test"],
        ["no split 'test'"],
    ),
    "other classes": (
        ["prune", *L1, "--data.dataset", "digits", *OUT],
        ["the data has 10 classes (", "the model has 1000", "--prune.num_labels data"],
    ),
    "same folder": (
        ["finetune", "--model", "@pruned", "--data.dataset", "@images", "--output", "@pruned"],
        ["--output", "exists"],
    ),
    "same folder, overwriting": (
        ["finetune", "--model", "@pruned", "--data.dataset", "@images", "--output", "@pruned", "--overwrite", "true"],
        ["--output", "contains --model"],
    ),
    "folder below a file": (["prune", *L1, "--output", "@pruned/config.json/out"], ["--output", "config.json"]),
    "scores of another base": (
        ["prune", *L1, "--prune.seed", "3", "--scores", "@scores", *OUT],
        ["scores", "other weights"],
    ),
    "no scores": (["prune", *L1, "--scores", "@pruned/model.safetensors", *OUT], ["not a file of importance scores"]),
    "scores that exist": (["score", *L1, "--output", "@scores"], ["--output", "exists", "--overwrite true"]),
    "scores below a file": (["score", *L1, "--output", "@pruned/config.json/scores"], ["config.json"]),
    "picture below a file": (
        ["inspect", "--model", "timm/test_vit", "--output", "@pruned/config.json/classes.png"],
        ["config.json"],
    ),
    "no repository": (["push", "@pruned", "--repo", "bad"], ["user/name", "'bad'"]),
}


@pytest.fixture(scope="module")
def scores(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("scores") / "importance.safetensors"
    succeed("score", *L1, "--output", file)
    return file


@pytest.mark.parametrize("kind", BAD_INPUT)
def test_bad_input_is_one_line_and_changes_nothing(
    kind: str, images: Path, cut_folder: Path, scores: Path, tmp_path: Path
) -> None:
    arguments, words = BAD_INPUT[kind]
    places = {"@tmp": tmp_path, "@images": images, "@pruned": cut_folder, "@scores": scores}
    for name, place in places.items():
        arguments = [argument.replace(name, str(place)) for argument in arguments]
    before = contents(cut_folder.parent), contents(scores.parent)
    line = refuse(*arguments)
    assert [word for word in words if word not in line] == [], line
    assert contents(tmp_path) == {}
    assert (contents(cut_folder.parent), contents(scores.parent)) == before


@pytest.mark.parametrize("stage", ["prune", "run"])
def test_output_that_is_not_empty_stays_untouched(stage: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "mine.txt").write_text("precious")
    line = refuse(stage, *L1, "--output", out)
    assert f"--output {out} exists" in line and "--overwrite true" in line
    assert contents(tmp_path) == {"out": None, "out/mine.txt": b"precious"}


@pytest.mark.parametrize("overwrite", ["true", "false"])
def test_scores_never_replace_a_folder(overwrite: str, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    assert f"--output {tmp_path}/out" in refuse("score", *L1, "--overwrite", overwrite, "--output", tmp_path / "out")
    assert contents(tmp_path) == {"out": None}


BAD_RECIPES: dict[str, tuple[str | None, list[str]]] = {
    "missing": (None, ["recipe.yaml", "cannot be read"]),
    "section": ("prun: {model: x}\n", ["recipe.yaml", "unknown section 'prun'", "did you mean prune?"]),
    "key": ("prune: {model: x, modle: x}\n", ["prune.modle"]),
    "value": ("prune: {model: x, ratio: many}\n", ["prune.ratio", "many"]),
    "range": ("prune: {model: x, ratio: 2}\n", ["prune.ratio must be between 0 and 1, got 2"]),
    "section is no mapping": ("prune: 3\n", ["prune"]),
    "list": ("- 1\n", ["recipe.yaml", "must contain sections"]),
    "empty": ("", ["recipe.yaml", "must contain sections"]),
    "not YAML": ("prune: [1\n", ["recipe.yaml", "is not YAML"]),
    "not text": ("\x00\x01", ["recipe.yaml", "is not YAML"]),
    "no model": ("prune: {ratio: 0.3}\n", ["prune.model is not set"]),
}


@pytest.mark.parametrize("kind", BAD_RECIPES)
def test_bad_recipe_file_is_one_line(kind: str, tmp_path: Path) -> None:
    text, words = BAD_RECIPES[kind]
    if text is not None:
        (tmp_path / "recipe.yaml").write_text(text)
    line = refuse("prune", "--config", tmp_path / "recipe.yaml", "--output", tmp_path / "out")
    assert [word for word in words if word not in line] == [], line
    assert not (tmp_path / "out").exists()


def test_unknown_recipe_key_gets_suggestion(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text("prune: {modle: x}\n")
    assert "did you mean prune.model?" in refuse("prune", "--config", tmp_path / "recipe.yaml")


def test_only_main_rank_reports_bad_input(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "1")
    assert isoprune("pruen") == Done(2, "", "")


def test_ctrl_c_ends_with_130(monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(*_: Any, **__: Any) -> str:
        raise KeyboardInterrupt

    monkeypatch.setitem(STAGES, "inspect", replace(STAGES["inspect"], run=stop))
    assert isoprune("inspect", "--model", VIT[1]) == Done(130, "", "")


@pytest.mark.parametrize("kind", ["FSDP", "DEEPSPEED", "MEGATRON_LM"])
def test_sharding_launch_is_refused(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(f"ACCELERATE_USE_{kind}", "true")  # as accelerate's launcher says it
    line = refuse("run", "--prune.criterion", "l1")
    assert f"accelerate is set to {kind}, but here each rank has the whole model" in line and "MULTI_GPU" in line
