"""Advice in messages names flags that exist, with values that they accept."""

import ast
import re
import shlex
from pathlib import Path

import pytest

import isoprune_hf
from isoprune_hf.cli.parser import parse
from isoprune_hf.cli.short_flags import types_of
from isoprune_hf.cli.table import STAGES, SWITCHES

PACKAGE = Path(isoprune_hf.__file__).parent
VALUE = r"(?: (?:true|false|data|none|no|l1|cpu|ema|activation_variance|least_squares)\b)?"
FLAG = re.compile(rf"(?<![\w-])--([a-z][\w.]*(?:-[a-z]+)*)({VALUE})")
COMMAND = re.compile(r"`isoprune ([a-z]+ [^`]+)`")


def messages() -> list[str]:
    """Collect the texts of the package that are no docstrings; inserted values become PLACE."""
    found = []
    for file in PACKAGE.rglob("*.py"):
        nodes = list(ast.walk(ast.parse(file.read_text())))
        inner = {id(part) for node in nodes if isinstance(node, ast.JoinedStr) for part in node.values}
        documented = {id(node.value) for node in nodes if isinstance(node, ast.Expr)}
        for node in nodes:
            if isinstance(node, ast.JoinedStr):
                parts = (part.value if isinstance(part, ast.Constant) else "PLACE" for part in node.values)
                found.append("".join(parts))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in inner | documented:
                found.append(node.value)
    return found


def names_of(stage: str) -> set[str]:
    return {*types_of(stage), *SWITCHES, "config", "print_config", "help", "help-all"}


MESSAGES = messages()
ADVISED = sorted({(name, value.strip()) for text in MESSAGES for name, value in FLAG.findall(text)})
COMMANDS = sorted({command for text in MESSAGES for command in COMMAND.findall(text)})


def test_every_advised_flag_exists() -> None:
    known = set().union(*map(names_of, STAGES)) | {"version", "completion"}
    short = {name.rpartition(".")[2].replace("_", "-") for name in known} | {"data"}
    assert len(ADVISED) > 40
    assert {name for name, _ in ADVISED if "PLACE" not in name} <= known | short


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, value in ADVISED if value and "." in name])
def test_advised_value_is_accepted(name: str, value: str) -> None:
    stage = next(stage for stage in ("prune", "finetune", "evaluate", "export") if name in types_of(stage))
    _, given = parse([stage, "MODEL", f"--{name}", value])
    section, _, setting = name.partition(".")
    assert str(getattr(given[section], setting)).lower() == value


@pytest.mark.parametrize("command", COMMANDS)
def test_advised_command_is_parsed(command: str) -> None:
    stage, given = parse(shlex.split(command))
    assert stage in STAGES and given is not None
