"""The stage frontier: several sizes from one scoring."""

import csv
import json
import re
import shlex
import sys
from pathlib import Path
from typing import Any

import pytest
from helpers.command_line import contents, isoprune, leftovers, read, refuse, succeed
from helpers.cut_folders import MODEL_ARGS, NAME, OPEN
from helpers.evaluation import numbers_of
from helpers.imagenet import write_imagenet
from helpers.imagenet_cut import offline_on_cpu
from helpers.images import write_images

from isoprune_hf.commands.frontier import read_sizes
from isoprune_hf.commands.steps.sizes import tabulate_sizes
from isoprune_hf.errors import RecipeError
from isoprune_hf.models import load_base
from isoprune_hf.pruning import score as scoring
from isoprune_hf.pruning.cost.macs import cost_model, count_cost
from isoprune_hf.pruning.cutting.cut import apply_plan
from isoprune_hf.pruning.deciding.make_plan import make_plan
from isoprune_hf.pruning.graph.find_groups import trace_groups
from isoprune_hf.pruning.scoring.score_groups import score_groups
from isoprune_hf.pruning.scoring.scores import ImportanceScores
from isoprune_hf.recipes import PruneRecipe

L1 = ["frontier", NAME, *OPEN, "--prune.criterion", "l1", "--prune.round_to", "2"]
FILES = {"frontier.csv", "frontier.json", "frontier.svg", "frontier.png", "importance.safetensors"}


def table_of(folder: Path) -> list[dict[str, str]]:
    with (folder / "frontier.csv").open() as file:
        return list(csv.DictReader(file))


def advised(printed: str) -> list[str]:
    """Return the words of the command that the stage ends with."""
    program, *words = shlex.split(printed.splitlines()[-1])
    assert program == "isoprune"
    return words


def test_every_size_is_cut_of_its_budget(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scorings = []

    def count_scorings(*arguments: Any, **options: Any) -> ImportanceScores:
        scorings.append(arguments)
        return score_groups(*arguments, **options)

    monkeypatch.setattr(scoring, "score_groups", count_scorings)
    out = tmp_path / "out"
    printed = succeed(*L1, "--sizes", "0.4,0.75", "--output", out)
    assert len(scorings) == 1
    assert {path.name for path in out.iterdir()} == FILES and leftovers(tmp_path) == []
    rows = table_of(out)
    assert [float(row["size"]) for row in rows] == [1.0, 0.75, 0.4]
    model = load_base(NAME, False, model_args=MODEL_ARGS, num_labels=10).model
    groups = trace_groups(model)
    scores, cost = score_groups(model, groups, criterion="l1"), cost_model(model, groups)
    for row in rows:
        cut = model
        if row["size"] != "1.0":
            budget = f"{100 * float(row['size'])}%"
            recipe = PruneRecipe(criterion="l1", target_macs=budget, round_to=2)
            cut = apply_plan(model, make_plan(groups, scores, recipe, cost=cost), groups)
        assert {name: int(row[name]) for name in ("macs", "params")} == count_cost(cut).to_dict()
        assert float(row["latency_ms"]) > 0
    assert rows[0].keys() == {"size", "macs", "params", "latency_ms"}  # nothing to measure an accuracy on
    record = read(out, "frontier.json")
    assert [{key: str(value) for key, value in row.items()} for row in record["rows"]] == rows
    assert record["criterion"] == "l1" and record["latency"]["repeats"] == 20
    assert len([line for line in printed.splitlines() if re.match(r"\d+% ", line)]) == len(rows)
    succeed(*advised(printed), "--prune.target_macs", "75%", "--output", tmp_path / "cut")
    assert read(tmp_path / "cut", "config.json")["cost"]["pruned"]["macs"] == int(rows[1]["macs"])


@pytest.mark.families
def test_accuracy_is_that_of_equal_cut(tmp_path: Path) -> None:
    images = write_imagenet(tmp_path / "images")
    data = ["--data.dataset", images, "--prune.calibration_batches", "2", "--prune.batch_size", "8"]
    with offline_on_cpu(tmp_path / "cache"):
        printed = succeed("frontier", NAME, *OPEN, *data, "--sizes", "0.5", "--output", tmp_path / "out")
        succeed(*advised(printed), "--output", tmp_path / "cut")
    rows, metrics = table_of(tmp_path / "out"), read(tmp_path / "cut", "metrics.json")
    for row, name in zip(rows, ("base", "pruned"), strict=True):
        assert {key: float(row[key]) for key in numbers_of(metrics[name])} == numbers_of(metrics[name])


@pytest.mark.families
def test_frontier_reads_images_as_data_settings_say(tmp_path: Path) -> None:
    root = write_images(tmp_path / "images", {"val": {2, 7}})
    data = ["--data.dataset", root, "--data.broken", "skip", "--prune.num_labels", "data"]
    base = ["--prune.pretrained", "false", "--prune.model_args", json.dumps(MODEL_ARGS)]
    rest = ["--prune.criterion", "l1", "--sizes", "0.5", "--output", tmp_path / "out"]
    assert isoprune("frontier", NAME, *base, *data, *rest).code == 0
    assert [(row["images"], row["broken"]) for row in table_of(tmp_path / "out")] == [("10", "2")] * 2


@pytest.mark.families
def test_frontier_is_replaced_only_with_overwrite(tmp_path: Path) -> None:
    out = tmp_path / "out"
    succeed(*L1, "--sizes", "0.6", "--output", out)
    before = contents(tmp_path)
    assert "--overwrite true" in refuse(*L1, "--sizes", "0.5", "--output", out)
    assert contents(tmp_path) == before
    succeed(*L1, "--sizes", "0.5", "--scores", out / "importance.safetensors", "--output", out, "--overwrite", "true")
    assert [row["size"] for row in table_of(out)] == ["1.0", "0.5"]
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "config.json").write_text("{}")
    line = refuse(*L1, "--output", tmp_path / "mine", "--overwrite", "true")
    assert "are not a result of this command" in line


def test_default_sizes_out_of_reach_are_left_out(tmp_path: Path) -> None:
    out = tmp_path / "out"
    printed = succeed(*L1, "--prune.max_ratio", "0.3", "--output", out)
    sizes = [row["size"] for row in table_of(out)]
    left_out = [line for line in printed.splitlines() if "is left out" in line]
    assert sizes == ["1.0", "0.8", "0.6"] and len(left_out) == 3
    assert "the size 30% is left out: prune.target_macs" in left_out[0] and "cannot be reached" in left_out[0]
    assert "cannot be reached" in refuse(*L1, "--prune.max_ratio", "0.01", "--output", tmp_path / "none")


BAD = {
    "word": (["--sizes", "half"], "--sizes"),
    "none": (["--sizes", ""], "got ''"),
    "empty part": (["--sizes", "0.5,"], "got ''"),
    "whole": (["--sizes", "1.0"], "got '1.0'"),
    "nothing": (["--sizes", "0"], "got '0'"),
    "nan": (["--sizes", "nan"], "got 'nan'"),
    "twice": (["--sizes", "0.5,0.50"], "--sizes names 0.5 twice"),
    "out of reach": (["--sizes", "0.5,0.001"], "cannot be reached"),
    "steps": (["--prune.steps", "2"], "set prune.steps to 1, got 2"),
    "no data": (["--prune.criterion", "taylor"], "criterion taylor needs data"),
    "no scores": (["--scores", "none.safetensors"], "not a file of importance scores"),
}


@pytest.mark.parametrize("kind", BAD)
def test_bad_input_is_one_line_and_writes_nothing(kind: str, tmp_path: Path) -> None:
    arguments, words = BAD[kind]
    assert words in refuse(*L1, *arguments, "--output", tmp_path / "out")
    assert contents(tmp_path) == {}


def test_missing_matplotlib_is_refused_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert "pip install isoprune-hf[publish]" in refuse(*L1, "--output", tmp_path / "out")
    assert contents(tmp_path) == {}


def test_sizes_are_read_from_text() -> None:
    assert read_sizes("0.8, .5,3e-1, 12.5%") == (0.8, 0.5, 0.3, 0.125)
    with pytest.raises(RecipeError, match="--sizes"):
        read_sizes("0.8;0.5")


def test_table_has_only_measured_columns() -> None:
    rows = [
        {"size": 1.0, "macs": 4_600_000_000, "params": 22_000_000, "latency_ms": 12.345, "top1": 0.5, "images": 20}
    ]
    assert tabulate_sizes(rows).splitlines() == [
        "size  GMACs   params  top-1 %  latency ms  images",
        "100%   4.60  22.00 M    50.00       12.35      20",
    ]
