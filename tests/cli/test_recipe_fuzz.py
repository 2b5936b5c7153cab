"""Damaged and hostile recipe files: each raises an IsoPruneError or gives settings within their ranges."""

from pathlib import Path
from typing import Any

import pytest
import yaml
from helpers.fuzzing import FEW, INPUTS, LIMITS, counts, damage, damage_bytes, guarded, watched
from hypothesis import given, seed, settings
from hypothesis import strategies as st

from isoprune_hf.cli.parser import parse
from isoprune_hf.errors import IsoPruneError
from isoprune_hf.recipes import data, finetune, prune
from isoprune_hf.recipes.values import Range, check_numbers

__all__ = ["watched"]
RECIPES = Path(__file__).parents[2] / "recipes"
RANGES: dict[str, dict[str, Range]] = {"prune": prune.RANGES, "data": data.RANGES, "finetune": finetune.RANGES}
STAGES = {"prune": ["prune"], "data": ["evaluate", "--model", "m"], "finetune": ["finetune", "--model", "m"]}
TOKENS = [
    *(b"&a ", b"*a ", b"<<: *a", b"!!python/object/apply:os.system ['touch isoprune_canary']", b"!!set {a}"),
    *(b"[", b"{", b"]", b"}", b"? ", b"- ", b": ", b"|\n", b"---\n", b"%YAML 9\n", b"\t", b"\x00", b"\xff"),
    *(b".nan", b".inf", b"1e999", b"9" * 400, b"9" * 5000, b"0x" + b"f" * 300, b"1:1:1:1", b"0o777", b"~"),
    *(b"extends: recipe.yaml\n", b"extends: /dev/zero\n", b"[" * 300, b"{a: " * 300),
]


def try_recipes(folder: Path, inputs: int) -> None:
    """Parse damaged copies of the published recipes, damaged as values or as text."""
    file = folder / "recipe.yaml"
    files = sorted(path for path in RECIPES.glob("*.yaml") if not path.name.startswith("_"))
    for path in RECIPES.glob("_*.yaml"):
        (folder / path.name).write_text(path.read_text())

    @seed(5)
    @settings(LIMITS, max_examples=inputs)
    @given(st.data())
    def attempt(drawn: st.DataObject) -> None:
        text = drawn.draw(st.sampled_from(files)).read_text()
        if drawn.draw(st.booleans()):
            values: Any = damage(drawn.draw, yaml.safe_load(text))
            content = yaml.safe_dump(values, allow_unicode=True).encode("utf-8", "surrogatepass")
        else:
            content = damage_bytes(drawn.draw, text.encode(), TOKENS)
        file.write_bytes(content)
        section = drawn.draw(st.sampled_from(sorted(RANGES)))
        with guarded("recipe", folder):
            try:
                _, config = parse([*STAGES[section], "--config", str(file)])
            except IsoPruneError as error:
                counts["recipe refused"] += 1
                assert str(error).strip()
                return
        counts["recipe read"] += 1
        check_numbers(section, config[section], RANGES[section])

    attempt()


def test_few_damaged_recipes_are_refused_or_read(tmp_path: Path) -> None:
    try_recipes(tmp_path, FEW)


@pytest.mark.fuzz
@pytest.mark.usefixtures("watched")
def test_damaged_recipe_is_refused_or_read(tmp_path: Path) -> None:
    try_recipes(tmp_path, INPUTS // 2)
