"""The notes of a plan: printed by `isoprune prune`, among its figures, and in the folder that it writes."""

import json
from pathlib import Path

import pytest
from helpers.command_line import isoprune, succeed

from isoprune_hf.checkpoint.structure import meta_copy
from isoprune_hf.commands.steps.results import figures_of_cut, summarize
from isoprune_hf.models import load_base
from isoprune_hf.pruning.plan import PruningPlan

BASE = ["--prune.model", "timm/resnet10t", "--prune.pretrained", "false", "--prune.num_labels", "5"]
AUTO = ["--prune.criterion", "l1", "--prune.remove_blocks", "auto"]
NOTE = "prune.remove_blocks auto removes nothing: the model has no removable residual blocks"


@pytest.mark.parametrize("flags", [AUTO, AUTO[:2]])
def test_notes_are_printed_after_the_table(flags: list[str], tmp_path: Path) -> None:
    folder = tmp_path / "pruned"
    out = succeed("prune", *BASE, *flags, "--output", folder)
    expected = (NOTE,) if flags == AUTO else ()
    assert PruningPlan.load(folder).notes == expected
    assert out.count(NOTE) == len(expected) and (f"\n\n{NOTE}\n\n" in out) == bool(expected)
    assert (NOTE in (folder / "README.md").read_text()) == bool(expected)


def test_time_before_second_cut_is_named(folders: Path) -> None:
    model = load_base(str(folders / "small")).model
    achieved = {
        "base": {"macs": 300, "params": 30, "latency_ms": 3.0},
        "pruned": {"macs": 200, "params": 20, "latency_ms": 2.0},
    }
    plan = PruningPlan({}, {}, achieved=achieved)
    dense = meta_copy(model, dense=True)
    assert figures_of_cut(plan, dense.config) == achieved
    figures = figures_of_cut(plan, model.config)
    assert figures == {"before": achieved["base"], "pruned": achieved["pruned"]}
    times = {name: row["latency_ms"] for name, row in figures.items()}
    rows = summarize(model, {}, times, folders / "small", before=figures["before"]).figures["models"]
    assert [*rows] == ["base", "before", "pruned"] and rows["before"] == achieved["base"]
    assert "latency_ms" not in rows["base"] and rows["pruned"]["latency_ms"] == 2.0


def test_notes_are_among_the_figures(tmp_path: Path) -> None:
    done = isoprune("prune", *BASE, *AUTO, "--output", tmp_path / "pruned", "--json")
    assert json.loads(done.out)["notes"] == [NOTE]
