"""The files beside the weights: read before the work, and figures added to them after it."""

import errno
import json
import logging
import os
import shutil
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from helpers.command_line import contents

from isoprune_hf.checkpoint.target import Target, locked_target
from isoprune_hf.checkpoint.target_lock import TargetLock
from isoprune_hf.commands.steps import recording
from isoprune_hf.commands.steps.recording import open_result_folder, read_records, record_benchmark, record_figures
from isoprune_hf.errors import CheckpointError
from isoprune_hf.models import load_base
from isoprune_hf.recipes import DataRecipe

BENCHMARK: dict[str, Any] = {
    "machine": {"device": "cpu", "threads": 1, "versions": {}},
    "promised": 2.0,
    "rows": [],
    "left_out": ["eager in bf16: no bf16"],
    "reason": None,
}
FIGURES = {"top1": 0.5, "loss": 1.0, "images": 4}


@pytest.fixture
def folder(pruned, tmp_path: Path) -> Path:
    return shutil.copytree(pruned("vit").folder, tmp_path / "model")


ODD: dict[str, list[Any]] = {
    "metrics.json": [[], {"base": 3}, {"pruned": {"top1": "high"}}, {"pruned": {"top1": None}}],
    "speed.json": [[], {"milliseconds": [1.0]}, {"milliseconds": {"base": "fast"}}],
    "pruning_plan.json": [{}, {"version": 1, "kept": 3, "heads": {}}],
}


@pytest.mark.parametrize("name", ODD)
def test_odd_files_are_refused_by_name(name: str, folder: Path) -> None:
    for content in ODD[name]:
        (folder / name).write_text(json.dumps(content))
        for read in (read_records, open_result_folder):
            with pytest.raises(CheckpointError, match=name.removesuffix(".json")):
                read(str(folder))


def test_places_without_files_have_no_records(tmp_path: Path) -> None:
    for place in (str(tmp_path), "timm/vit"):
        assert read_records(place) == recording.Records()
        assert open_result_folder(place) is None


def record(folder: Path, between: Callable[[], object] = lambda: None) -> None:
    place = open_result_folder(str(folder))
    assert place is not None
    model = load_base(str(folder)).model
    between()
    record_figures(place, model, FIGURES, DataRecipe("digits"))
    record_benchmark(place, BENCHMARK)


def test_figures_are_added_to_known_ones(folder: Path) -> None:
    (folder / "metrics.json").write_text('{"base": {"top1": 0.7}}')
    (folder / "speed.json").write_text('{"device": "cpu"}')
    record(folder)
    assert json.loads((folder / "metrics.json").read_text()) == {"base": {"top1": 0.7}, "pruned": FIGURES}
    assert json.loads((folder / "speed.json").read_text()) == {"device": "cpu", "benchmark": BENCHMARK}
    assert "digits" in (folder / "README.md").read_text()
    assert not (folder.parent / ".model.lock").exists()


def test_files_of_a_result_change_together(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Until the one exchange, a reader sees every file as it was; after it, all of them with the new figures."""
    seen: list[dict[str, bytes | None]] = []
    take = Target.take_folder

    def look(target: Target, written: Path) -> None:
        seen.append(contents(folder))
        take(target, written)
        seen.append(contents(folder))

    monkeypatch.setattr(Target, "take_folder", look)
    before = contents(folder)
    record(folder)
    changed = [{name for name in {*old, *new} if old.get(name) != new.get(name)} for old, new in pairwise(seen)]
    assert seen[0] == before and changed == [
        {"metrics.json", "config.json", "README.md"},
        set(),
        {"speed.json", "README.md"},
    ]


def test_folder_is_named_in_its_card(folder: Path) -> None:
    record(folder)
    assert 'model="model"' in (folder / "README.md").read_text()


def replace_weights(folder: Path) -> None:
    (folder / "new").write_bytes((folder / "model.safetensors").read_bytes())
    os.replace(folder / "new", folder / "model.safetensors")


def test_figures_of_replaced_weights_are_not_stored(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    before = contents(folder)
    with caplog.at_level(logging.WARNING):
        record(folder, lambda: replace_weights(folder))
    assert contents(folder) == before
    assert [line.getMessage().partition(":")[0] for line in caplog.records] == ["the figures are not stored"] * 2


def test_occupied_folder_is_left_alone(
    folder: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recording, "_WAIT_SECONDS", 0.0)
    before = contents(folder)
    with locked_target(folder), caplog.at_level(logging.WARNING):
        record(folder)
    assert contents(folder) == before and len(caplog.records) == 2


def test_failing_card_keeps_the_figures(
    folder: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise KeyError("rows")

    monkeypatch.setattr(recording, "build_model_card", fail)
    with caplog.at_level(logging.WARNING):
        record(folder)
    assert json.loads((folder / "metrics.json").read_text()) == {"pruned": FIGURES}
    assert [line.getMessage() for line in caplog.records] == [
        "the model card failed (KeyError: 'rows'); the figures are stored"
    ] * 2


def test_read_only_folder_keeps_the_command_going(
    folder: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(TargetLock, "acquire", refuse)
    before = contents(folder)
    with caplog.at_level(logging.WARNING):
        record(folder)
    assert contents(folder) == before and len(caplog.records) == 2
