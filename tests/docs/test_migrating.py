"""The page for users of the reference: each of its commands is valid."""

import re
from pathlib import Path

from isoprune_hf.cli.parser import parse

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "docs" / "migrating.md").read_text()
BLOCKS = re.findall(r"^```bash\n(.*?)^```$", TEXT, re.MULTILINE | re.DOTALL)
COMMANDS = [line for block in BLOCKS for line in block.splitlines()]


def test_every_paper_recipe_is_on_the_page() -> None:
    cut = set(re.findall(r"^isoprune prune --config recipes/(\S+)\.yaml", TEXT, re.MULTILINE))
    assert cut == {path.stem for path in (ROOT / "recipes").glob("*_*g.yaml") if not path.stem.startswith("_")}


def test_commands_of_page_read_reference_folder() -> None:
    """`test_docs` parses each of them."""
    assert len(COMMANDS) > 20
    for command in COMMANDS:
        assert "--data.dataset data/imagenet" in command or command.startswith("isoprune convert "), command


def test_every_setting_in_the_tables_is_a_flag() -> None:
    named = set(re.findall(r"--((?:prune|data|finetune)\.\w+)", TEXT))
    config = parse(["run", "--prune.model", "timm/resnet50"])[1]
    assert {name for name in named if not hasattr(config[name.split(".")[0]], name.split(".")[1])} == set()
    assert len(named) > 25
