"""Declarations of the stages: they fit the functions that do the work, and cost nothing to import."""

import inspect
import json
from typing import Any, get_args

import pytest
from helpers.fresh_python import FreshPython

from isoprune_hf.cli.short_flags import types_of
from isoprune_hf.cli.table import HEADINGS, SECTIONS, STAGES
from isoprune_hf.commands.stage import Flag
from isoprune_hf.export.formats import Format
from isoprune_hf.export.values import ExportPrecision
from isoprune_hf.legacy.tree import Weights
from isoprune_hf.measuring.runtimes.registry import ENGINES
from isoprune_hf.recipes.values import DType, RuntimeName


@pytest.mark.parametrize("name", STAGES)
def test_run_takes_declared_sections_and_flags(name: str) -> None:
    stage = STAGES[name]
    parameters = inspect.signature(stage.run).parameters
    assert {parameter.kind for parameter in parameters.values()} == {inspect.Parameter.KEYWORD_ONLY}
    declared = [*stage.sections, *(flag.name for flag in stage.flags)]
    assert sorted(parameters) == sorted(declared if stage.is_local else ["accelerator", *declared])
    assert set(stage.positional) <= types_of(name).keys() and set(stage.sections) <= SECTIONS.keys()
    for flag in stage.flags:
        assert parameters[flag.name].annotation == flag.type, flag.name


def test_every_stage_is_under_one_heading() -> None:
    listed = [name for names in HEADINGS.values() for name in names]
    assert sorted(listed) == sorted({name.split()[0] for name in STAGES})


def test_choices_of_flags_are_those_of_registries() -> None:
    kinds = {(stage.name, flag.name): flag.type for stage in STAGES.values() for flag in stage.flags}
    assert kinds["export", "format"] == Format and kinds["export", "precision"] == ExportPrecision
    assert kinds["benchmark", "dtypes"] == list[DType] and kinds["benchmark", "runtimes"] == list[RuntimeName]
    assert set(get_args(RuntimeName)) == set(ENGINES)
    assert kinds["convert", "weights"] == Weights


def test_every_output_is_locked_and_apart_from_inputs() -> None:
    """A stage with an output opens it as a target at its start, and names to it what it reads."""
    for stage in STAGES.values():
        if any(flag.name == "output" for flag in stage.flags):
            source = inspect.getsource(stage.run)
            assert "open_target(" in source and "check_output(" not in source, stage.name
            assert "check_inputs(" in source or stage.name == "inspect", stage.name


def test_only_generic_lists_are_list_flags() -> None:
    kinds: dict[Any, bool] = {list[int]: True, dict[str, Any]: False, int: False, str | None: False}
    assert {kind: Flag("f", kind, None, "").is_list for kind in kinds} == kinds


def test_help_loads_no_heavy_library(fresh_python: FreshPython) -> None:
    script = """
import json, sys
from isoprune_hf.__main__ import main
main(["--help"])
print(json.dumps(sorted(name for name in sys.modules if name.startswith("isoprune_hf."))))
"""
    loaded = json.loads(fresh_python.run(script).stdout.splitlines()[-1])
    light = (
        "checkpoint",
        "cli",
        "commands",
        "limits",
        "recipes",
        "__main__",
        "errors",
        "extras",
        "terminal",
        "version",
    )
    assert [name for name in loaded if name.split(".")[1] not in light] == []
    assert [name for name in loaded if name.startswith("isoprune_hf.commands.steps.")] == []
    assert "isoprune_hf.commands.prune" in loaded
