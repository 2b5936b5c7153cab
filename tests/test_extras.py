"""Optional packages: a light installation opens models, and names the extra that the other work needs."""

import ast
import configparser
import json
import re
import subprocess
import sys
from collections.abc import Callable
from importlib.metadata import packages_distributions
from pathlib import Path
from typing import Any

import pytest
from helpers.command_line import isoprune
from helpers.fresh_python import FreshPython
from helpers.pruned_models import Pruned

import isoprune_hf
from isoprune_hf import __main__
from isoprune_hf.cli.table import STAGES
from isoprune_hf.errors import MissingExtraError
from isoprune_hf.extras import EXTRAS, naming_extra, require_package

ROOT = Path(__file__).parents[1]
# Libraries of a light installation that are imported when they are first needed.
REQUIRED = ("torch", "torchvision", "transformers", "timm", "huggingface_hub", "safetensors")
# Makes every optional package impossible to import, and pandas, which only they install.
LIGHT = f"""
import sys
from importlib.machinery import PathFinder

class Light(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        absent = name.partition(".")[0] in {sorted([*EXTRAS, "pandas"])}
        return None if absent else super().find_spec(name, path, target)

sys.meta_path = [Light if finder is PathFinder else finder for finder in sys.meta_path]
"""


def names(text: str) -> set[str]:
    """Return the names of the distributions in a list of requirements."""
    return {re.split(r"[\[<>=~!; ]", line)[0].lower().replace("_", "-") for line in text.split("\n") if line.strip()}


@pytest.fixture(scope="module")
def setup() -> configparser.ConfigParser:
    parser = configparser.ConfigParser()
    parser.read(ROOT / "setup.cfg")
    return parser


def test_each_package_is_in_its_named_extra(setup: configparser.ConfigParser) -> None:
    # datasets brings pyarrow; executorch and litert are no part of `all`, because they bring torchao. An environment
    # that is older than the use of nncf lacks it; coremltools is of use on macOS alone.
    apart = {
        name: [name] for name in ("executorch", "torchao", "litert_torch", "ai_edge_litert", "nncf", "coremltools")
    }
    distributions = packages_distributions() | {"pyarrow": ["datasets"]} | apart
    extras = setup["options.extras_require"]
    for package, extra in EXTRAS.items():
        assert {name.lower().replace("_", "-") for name in distributions[package]} & names(extras[extra]), package


def test_every_import_is_required_or_optional(setup: configparser.ConfigParser) -> None:
    core = names(setup["options"]["install_requires"]) - {"pillow"} | {"PIL", "yaml", "markupsafe", "isoprune_hf"}
    core = {name.replace("-", "_") for name in core}  # yaml comes with timm, markupsafe with torch
    for path in (ROOT / "isoprune_hf").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            found = [node.module] if isinstance(node, ast.ImportFrom) else []
            found += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            for name in found:
                top = name.partition(".")[0]
                assert top in core | set(EXTRAS) | set(sys.stdlib_module_names), f"{path}: {name}"


ANSWERED = (["--help"], ["--version"], ["--quiet", "-h"])
REFUSED = (*(name.split() for name in STAGES), [], ["prune", "--help"], ["--completion", "bash"])


@pytest.fixture(scope="module")
def light(pruned: Callable[[str], Pruned]) -> dict[str, Any]:
    """Answers of one process without optional packages: commands, and a prediction of a pruned model."""
    script = f"""{LIGHT}
import contextlib, io, json
from isoprune_hf.__main__ import main

def call(words):
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(io.StringIO()) as err:
        code = main(words)
    return code, out.getvalue(), err.getvalue()

answers = {{"answered": [call(words) for words in {ANSWERED}], "refused": [call(words) for words in {REFUSED}]}}
from PIL import Image
from transformers import pipeline
import isoprune_hf
classify = pipeline("image-classification", model=sys.argv[1])
answers["labels"] = [found["label"] for found in classify(Image.new("RGB", (40, 30), (200, 30, 90)))]
model, processor = isoprune_hf.load_base(sys.argv[1])
answers["params"] = sum(p.numel() for p in model.parameters())
print(json.dumps(answers))
"""
    command = [sys.executable, "-c", script, str(pruned("vit").folder)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    answers: dict[str, Any] = json.loads(done.stdout)
    return answers


@pytest.mark.launch
def test_light_installation_opens_model_and_predicts(light: dict[str, Any], pruned: Callable[[str], Pruned]) -> None:
    model = pruned("vit").model
    assert len(light["labels"]) == 5 and set(light["labels"]) <= model.config.label2id.keys()
    assert light["params"] == sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.launch
def test_light_installation_names_extra_of_every_stage(light: dict[str, Any]) -> None:
    line = r"isoprune: error: the command line needs \w+, which is not installed: pip install isoprune-hf\[prune\]\n"
    assert len(light["refused"]) == len(REFUSED) > len(STAGES)
    for code, out, err in light["refused"]:
        assert (code, out) == (2, "") and re.fullmatch(line, err), err


@pytest.mark.launch
@pytest.mark.parametrize("arguments", ANSWERED, ids=" ".join)
def test_light_installation_answers_help_and_version(arguments: list[str], light: dict[str, Any]) -> None:
    code, out, err = light["answered"][ANSWERED.index(arguments)]
    assert (code, err) == (0, "")
    full = isoprune(*arguments)
    assert (full.code, full.out) == (0, out)
    begin = "isoprune " + isoprune_hf.__version__ if "--version" in arguments else "usage: isoprune "
    assert out.startswith(begin) and out.endswith("\n")


@pytest.mark.parametrize(
    ("package", "arguments", "extra"),
    [
        ("evaluate", ["prune", "--prune.model", "timm/test_vit"], "prune"),
        ("sklearn", ["prune", "--prune.model", "timm/test_vit", "--data.dataset", "digits"], "train"),
        ("matplotlib", ["inspect", "timm/test_vit", "--html", "page.html"], "publish"),
    ],
)
def test_stage_names_its_missing_extra(
    package: str, arguments: list[str], extra: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    readers = [f"isoprune_hf.{name}" for name in ("commands.steps", "evaluation.", "tasks")]
    for name in [*sys.modules]:
        if name.startswith((*readers, f"{package}.")):
            monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(SystemExit) as stopped:
        __main__.main(arguments)
    assert stopped.value.code == 2
    assert re.fullmatch(rf"isoprune: error: .* needs {package}, .*\[{extra}\]\n", capsys.readouterr().err)


def test_public_name_names_its_missing_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("isoprune_hf.api.finetune", "isoprune_hf.training.finetune"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.setitem(sys.modules, "accelerate", None)
    with pytest.raises(MissingExtraError, match=r"^finetune .*accelerate.* isoprune-hf\[prune\]$"):
        _ = isoprune_hf.finetune


def test_missing_package_without_extra_stays_as_is() -> None:
    with pytest.raises(ModuleNotFoundError, match="no_such_package") as found, naming_extra("this"):
        require_package("no_such_package", "this")
    assert not isinstance(found.value, MissingExtraError)


def test_import_loads_only_light_half(fresh_python: FreshPython) -> None:
    script = """
import sys
import torch
from transformers import AutoImageProcessor, AutoModelForImageClassification, pipeline
before = set(sys.modules)
import isoprune_hf
print(*sorted(set(sys.modules) - before))
"""
    done = fresh_python.run(script)
    assert done.returncode == 0, done.stderr
    new = set(done.stdout.split())
    watched = ("isoprune_hf", *REQUIRED, *EXTRAS)
    parts = {tuple(name.split(".")[:2]) for name in new if name.partition(".")[0] in watched}
    of_ours = ("checkpoint", "errors", "extras", "limits", "recipes", "version")
    assert parts == {("isoprune_hf",), *(("isoprune_hf", part) for part in of_ours)}
