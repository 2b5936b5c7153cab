"""Help and version without importing anything heavy."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from helpers.help_texts import FOLDER, make_texts

from isoprune_command import find_answer
from isoprune_hf.version import __version__

ROOT = Path(__file__).parents[2]


def test_stored_texts_are_those_of_parser(monkeypatch: pytest.MonkeyPatch) -> None:
    """`python tests/helpers/help_texts.py` stores them: read the difference before committing it."""
    monkeypatch.setenv("COLUMNS", "100")
    stored = {path.stem: path.read_text(encoding="utf-8") for path in FOLDER.iterdir()}
    assert stored == make_texts()


@pytest.mark.parametrize(
    ("words", "file"),
    [
        ("--help", "isoprune"),
        ("-h", "isoprune"),
        ("prune --help", "prune"),
        ("prune timm/x --target-macs 50% -h", "prune"),
        ("plan --help", "plan"),
        ("plan show -h", "plan_show"),
        ("prune", None),
        ("prune --help-all", None),
        ("pruen --help", None),
        ("--config r.yaml --help", None),
        ("../secret --help", None),
        ("", None),
    ],
)
def test_help_is_found_by_its_stage(words: str, file: str | None) -> None:
    expected = None if file is None else (FOLDER / f"{file}.txt").read_text(encoding="utf-8")
    assert find_answer(words.split()) == expected


@pytest.mark.parametrize("words", [["--version"], ["prune", "--help"]])
def test_answer_imports_only_the_standard_library(words: list[str]) -> None:
    code = "import json, sys; from isoprune_command import main; main(); print(json.dumps([*sys.modules]))"
    done = subprocess.run([sys.executable, "-c", code, *words], cwd=ROOT, capture_output=True, text=True, check=True)
    *said, modules = done.stdout.splitlines()
    assert {name.partition(".")[0] for name in json.loads(modules)} & {"isoprune_hf", "torch", "transformers"} == set()
    assert said[0] == (f"isoprune {__version__}" if words == ["--version"] else "usage: isoprune prune MODEL [FLAGS]")
