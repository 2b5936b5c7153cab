"""Misspelt flags and values."""

import re
from pathlib import Path
from typing import Any

import pytest
from helpers.command_line import refuse

from isoprune_hf.cli.short_flags import short_name, types_of
from isoprune_hf.cli.spelling import describe_wrong_value, suggest_flag
from isoprune_hf.cli.table import STAGES

FLAGS = [(stage, name) for stage in STAGES for name in types_of(stage)]


@pytest.mark.parametrize(
    ("stage", "given", "meant"),
    [
        ("prune", "target-mac", "target-macs"),
        ("prune", "traget_macs", "target-macs"),
        ("prune", "data.batchsize", "data.batch_size"),
        ("finetune", "epoch", "epochs"),
        ("finetune", "lr", "learning-rate"),
        ("run", "versoin", "version"),
        ("push", "repos", "repo"),
    ],
)
def test_unknown_flag_names_a_near_one(stage: str, given: str, meant: str) -> None:
    assert suggest_flag(stage, given) == f"; did you mean --{meant}?"


@pytest.mark.families
def test_every_flag_survives_a_lost_letter() -> None:
    lost = [(stage, name) for stage, name in FLAGS if not suggest_flag(stage, short_name(stage, name)[:-1])]
    assert lost == []
    assert suggest_flag("prune", "zzzzzz") == ""


@pytest.mark.parametrize(
    ("stage", "name", "value", "message"),
    [
        (
            "prune",
            "prune.scope",
            "globel",
            "must be one of isomorphic, global, local, got 'globel'; did you mean global?",
        ),
        ("prune", "prune.round_to", "eight", "must be a whole number, got 'eight'"),
        ("prune", "prune.num_labels", "dta", "must be a whole number or data, got 'dta'; did you mean data?"),
        ("evaluate", "pretrained", "flase", "must be true or false, got 'flase'"),
        (
            "benchmark",
            "runtimes",
            "egaer",
            "must be a list of eager, channels_last, compile, onnxruntime, openvino, got 'egaer'; did you mean eager?",
        ),
        (
            "benchmark",
            "runtimes",
            "onnx",
            "must be a list of eager, channels_last, compile, onnxruntime, openvino, got 'onnx'",
        ),
        ("prune", "data.mean", "x", "must be a list of numbers, got 'x'"),
    ],
)
def test_wrong_value_names_what_is_allowed(stage: str, name: str, value: str, message: str) -> None:
    assert describe_wrong_value(stage, name, value) == f"{name} {message}"


def test_no_flag_speaks_of_python_types() -> None:
    texts = [text for stage, name in FLAGS if (text := describe_wrong_value(stage, name, "x"))]
    assert len(texts) > 100
    assert [text for text in texts if re.search(r"<class|typing|Union|\bNone", text.partition(" must")[2])] == []


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--criterion", "tayler"], "taylor?"),
        (["--traget-macs", "50%"], "--target-macs?"),
        (["--round-to", "x"], "'x'"),
        (["--config", "recipes/deit_4.2gg.yaml"], "recipes/deit_4.2g.yaml?"),
    ],
)
def test_command_line_says_what_was_meant(flags: list[str], words: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(Path(__file__).parents[2])
    line = refuse("prune", "timm/resnet18", *flags)
    assert words in line and "Parser key" not in line
