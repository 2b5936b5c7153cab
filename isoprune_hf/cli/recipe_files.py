"""Read recipe files: YAML with a section for each part of the work, in one file or in several; see `read_recipe`.

A file that `extends` another one inherits its settings and gives those that differ. `source` and `expect` are for
readers: where the values come from, and the published figures. No stage reads them, and they are not inherited.
"""

import glob
import itertools
import json
import math
import os
from collections import Counter
from dataclasses import fields
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import get_loader

from isoprune_hf import recipes
from isoprune_hf.cli.table import SECTIONS, STAGES
from isoprune_hf.errors import RecipeError
from isoprune_hf.limits import MAX_RECIPE_BYTES, MAX_RECIPE_FILES, MAX_RECIPE_VALUES
from isoprune_hf.plain_files import read_text
from isoprune_hf.terminal import suggest

EXPECTED = ("gmacs", "params_m", "top1")
_SETTINGS = {name: {field.name for field in fields(section)} for name, section in SECTIONS.items()}
_FLAGS = {flag.name for stage in STAGES.values() for flag in stage.flags}
_NOTES = ("extends", "source", "expect")
# The published recipes: a wheel has them inside the package, a source tree in its top folder.
_PUBLISHED = (Path(recipes.__file__).parent / "published", Path(recipes.__file__).parents[2] / "recipes")


def find_recipe(name: str | Path) -> Path:
    """Return the path of a recipe file: `name` itself, or the published recipe of that name if there is no such file.

    Args:
        name: A path, or the bare name of a published recipe, with or without `.yaml`.
    """
    path = Path(name)
    if not path.is_file() and path.parent == Path() and path.name:
        for folder in _PUBLISHED:
            published = folder / f"{path.name.removesuffix('.yaml')}.yaml"
            if published.is_file():
                return published
    return path


def read_recipe(file: str | Path) -> dict[str, Any]:
    """Read a recipe file and all files that it extends; `file` is a path or the name of a published recipe.

    Returns:
        Section -> the given settings; flags of stages; `source` and `expect`.

    Raises:
        RecipeError: A file cannot be read, extends itself, or has an unknown key. Values are checked later.
    """
    return _read(find_recipe(file), ())


def select_stage(recipe: dict[str, Any], stage: str) -> dict[str, Any]:
    """Return the part of a recipe that a stage reads: its sections and, for `run`, its flags."""
    wanted = set(STAGES[stage].sections)
    if stage == "run":
        wanted |= {flag.name for flag in STAGES[stage].flags}
    return {name: value for name, value in recipe.items() if name in wanted}


def _read(file: Path, extending: tuple[Path, ...]) -> dict[str, Any]:
    """Read a file; `extending` are the files that led to it."""
    if os.path.realpath(file) in map(os.path.realpath, extending):
        chain = " extends ".join(str(path) for path in (*extending, file))
        raise RecipeError(f"--config: {chain}: recipe files must not extend each other in a cycle")
    if len(extending) == MAX_RECIPE_FILES:
        raise RecipeError(f"--config: {extending[0]} extends a chain of more than {MAX_RECIPE_FILES - 1} files")
    values = _load(file, extending)
    _check(file, values)
    if "extends" not in values:
        return values
    base = _read(file.parent / values.pop("extends"), (*extending, file))
    return _merge({name: value for name, value in base.items() if name not in _NOTES}, values)


def _load(file: Path, extending: tuple[Path, ...]) -> dict[str, Any]:
    try:
        text = read_text(file, MAX_RECIPE_BYTES)
        _check_size(text)
        values = get_loader("yaml")(text)
        json.dumps(values)  # refuses values that are not plain
    except OSError as error:
        by = f"; {extending[-1]} extends it, by a path from its own folder" if extending else ""
        beside = glob.glob(os.path.join(glob.escape(str(file.parent)), "*.y*ml"))
        near = suggest(str(file), beside, limit=1) if not os.path.exists(file) else ""
        raise RecipeError(f"--config: the recipe file {file} cannot be read ({error.strerror}){by}{near}") from error
    except (TypeError, ValueError, RecursionError, yaml.YAMLError) as error:
        raise RecipeError(f"--config: {file} is not YAML: {error}") from error
    if not isinstance(values, dict):
        raise RecipeError(f"--config: {file} must contain sections such as prune, data and finetune")
    return values


def _check_size(text: str) -> None:
    """Check how many values a YAML text has once its aliases are written out, before that is done.

    Raises:
        ValueError: They are too many, an alias contains itself, or a mapping has a key twice.
        YAMLError: The text is not YAML.
    """
    sizes: dict[int, float] = {}

    def measure(node: yaml.Node) -> float:
        if id(node) not in sizes:
            sizes[id(node)] = math.inf  # if the node is reached again within itself
            pairs = node.value if isinstance(node, yaml.CollectionNode) else ()
            if isinstance(node, yaml.MappingNode):
                _check_keys(node)
            parts = itertools.chain.from_iterable(pairs) if isinstance(node, yaml.MappingNode) else pairs
            sizes[id(node)] = 1 + sum(map(measure, parts))
        return sizes[id(node)]

    root = yaml.compose(text, Loader=yaml.SafeLoader)
    size = 0 if root is None else measure(root)
    if size > MAX_RECIPE_VALUES:
        raise ValueError("an alias contains itself" if size == math.inf else f"more than {MAX_RECIPE_VALUES:,} values")


def _check_keys(mapping: yaml.MappingNode) -> None:
    """Check that a mapping has each key once: YAML forbids it, and PyYAML would use the last one in silence.

    Raises:
        ValueError: It has one twice.
    """
    keys = [key.value for key, _ in mapping.value if isinstance(key, yaml.ScalarNode)]
    twice = [key for key, count in Counter(keys).items() if count > 1]
    if twice:
        raise ValueError(f"{twice[0]} stands twice, in line {mapping.start_mark.line + 1} and after it")


def _merge(base: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """Return `base` updated with `changes`, recursively where both have a mapping."""
    merged = {
        key: _merge(base[key], value) if isinstance(value, dict) and isinstance(base.get(key), dict) else value
        for key, value in changes.items()
    }
    return {**base, **merged}


def _check(file: Path, values: dict[str, Any]) -> None:
    known = (*SECTIONS, *_NOTES, *sorted(_FLAGS))
    for name, section in values.items():
        if name not in known:
            raise RecipeError(f"--config: {file} has an unknown section {name!r}{suggest(str(name), known, limit=1)}")
        is_text = isinstance(section, str) and section and (name == "source" or section.isprintable())
        if name in ("extends", "source") and not is_text:
            what = "the path of a recipe file" if name == "extends" else "a text"
            raise RecipeError(f"--config: {name} of {file} must be {what}, got {section!r}")
        if name in (*SECTIONS, "expect"):
            _check_section(file, name, section)
    for key, value in values.get("expect", {}).items():
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < float("inf"):
            raise RecipeError(f"--config: expect.{key} of {file} must be a number above 0, got {value!r}")


def _check_section(file: Path, name: str, section: Any) -> None:
    if not isinstance(section, dict):
        raise RecipeError(f"--config: section {name} of {file} must contain settings, got {section!r}")
    known = _SETTINGS.get(name, EXPECTED)
    for key in section:
        if key not in known:
            near = suggest(f"{name}.{key}", [f"{name}.{known_key}" for known_key in known], limit=1)
            raise RecipeError(f"--config: {file} has an unknown setting {name}.{key}{near}")
