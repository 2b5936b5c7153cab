"""The page for users of the reference: each command that it tells them to type is one."""

import re
import shlex
from pathlib import Path

import pytest

from isoprune_hf.command_parser import parse

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "docs" / "migrating.md").read_text()
BLOCKS = re.findall(r"^```bash\n(.*?)^```$", TEXT, re.MULTILINE | re.DOTALL)
COMMANDS = [line for block in BLOCKS for line in block.splitlines()]


def test_every_recipe_of_the_paper_is_on_the_page() -> None:
    cut = set(re.findall(r"^isoprune prune --config recipes/(\S+)\.yaml", TEXT, re.MULTILINE))
    assert cut == {path.stem for path in (ROOT / "recipes").glob("*_*g.yaml") if not path.stem.startswith("_")}


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_of_the_page_is_understood(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    words = shlex.split(command)
    if words[0] == "accelerate":
        assert words[:2] == ["accelerate", "launch"] and (ROOT / "train_accelerate.py").is_file()
        words = words[words.index("train_accelerate.py") :]
    assert words[0] in ("isoprune", "train_accelerate.py")
    stage, config = parse(words[1:])
    assert stage in ("run", "prune", "finetune", "evaluate", "convert")
    if "data" in config:
        assert config.data.dataset == "data/imagenet"


def test_every_setting_that_the_tables_name_is_a_flag() -> None:
    named = set(re.findall(r"--((?:prune|data|finetune)\.\w+)", TEXT))
    config = parse(["run", "--prune.model", "timm/resnet50"])[1]
    assert {name for name in named if not hasattr(config[name.split(".")[0]], name.split(".")[1])} == set()
    assert len(named) > 25
