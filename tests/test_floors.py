"""The house: who may import whom, and what must not be in the code."""

import ast
import re
from pathlib import Path

import pytest

from isoprune_hf.checkpoint.modeling_isoprune import PARTS

PACKAGE = Path(__file__).parents[1] / "isoprune_hf"
MODULES = sorted(PACKAGE.rglob("*.py"))
FLOORS = [
    ("checkpoint/dense.py", 0),
    ("checkpoint/difference.py", 0),
    ("checkpoint/modeling_isoprune.py", 0),
    ("version.py", 0),
    ("errors.py", 1),
    ("extras.py", 2),
    ("terminal.py", 2),
    ("recipes/", 2),
    ("checkpoint/", 2),
    ("processors.py", 3),
    ("models/", 4),
    ("legacy/", 4),
    ("pruning/", 3),
    ("training/", 3),
    ("publishing/", 5),
    ("commands.py", 3),
    ("recipe_files.py", 3),
    ("command_help.py", 4),
    ("command_parser.py", 4),
    ("sources.py", 6),
    ("results.py", 6),
    ("finetuning.py", 6),
    ("stages.py", 7),
    ("inspection.py", 7),
    ("conversion.py", 7),
    ("assessment.py", 7),
    ("frontier.py", 7),
    ("deployment.py", 7),
    ("cli.py", 8),
    ("__main__.py", 9),
    ("__init__.py", 9),
]
ONLY_IN = {
    "torch_pruning": {"pruning/graph/torch_pruning/depgraph.py"},
    "datasets": {"data/sources.py", "data/dataset.py", "data/streaming.py"},
    "evaluate": {"evaluation/metrics.py"},
    "huggingface_hub": {"publishing/", "checkpoint/dense.py"},
}


def place(path: Path) -> str:
    return path.relative_to(PACKAGE).as_posix()


def floor_of(name: str) -> int:
    return next(
        floor for prefix, floor in FLOORS if name == prefix or (prefix.endswith("/") and name.startswith(prefix))
    )


def imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found.add(node.module)
    return found


@pytest.mark.parametrize("path", MODULES, ids=place)
def test_imports_point_downwards(path: Path) -> None:
    for name in imports(path):
        if name.startswith("isoprune_hf.") and path.name != "__init__.py":
            inner = name.removeprefix("isoprune_hf.").replace(".", "/")
            target = f"{inner}.py" if (PACKAGE / f"{inner}.py").exists() else f"{inner}/"
            assert floor_of(target) <= floor_of(place(path)), f"{place(path)} imports {name}"


@pytest.mark.parametrize("path", MODULES, ids=place)
def test_engines_are_imported_in_their_one_place(path: Path) -> None:
    for name in imports(path):
        allowed = ONLY_IN.get(name.partition(".")[0])
        assert allowed is None or any(place(path).startswith(prefix) for prefix in allowed), name


def test_what_ships_with_weights_imports_nothing_of_ours_but_its_own_parts() -> None:
    parts = {f"isoprune_hf.checkpoint.{name.removesuffix('.py')}" for name in PARTS}
    for name in PARTS:
        assert {used for used in imports(PACKAGE / "checkpoint" / name) if used.startswith("isoprune_hf")} <= parts


@pytest.mark.parametrize("path", MODULES, ids=place)
def test_modules_are_short_and_neither_pickle_nor_print_nor_execute(path: Path) -> None:
    text = path.read_text()
    assert len(text.splitlines()) <= 300
    assert not re.search(
        r"\bimport pickle\b|pickle\.load|torch\.load\(|torch\.save\(|(?<![.\w])eval\(|\bexec\(|yaml\.load\(", text
    )
    assert path.name == "cli.py" or not re.search(r"^\s*print\(", text, re.MULTILINE)
