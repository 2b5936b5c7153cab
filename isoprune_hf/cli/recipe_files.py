"""Recipe files: YAML with a section for each part of the work, made of one file or of several.

A file that `extends` another one has its settings, and says what differs. `source` and `expect` are for people: where
the values come from, and the published figures; no stage reads them, and no file has those of the one it extends.
"""

import json
from dataclasses import fields
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import get_loader

from isoprune_hf import recipes
from isoprune_hf.cli.table import SECTIONS, STAGES
from isoprune_hf.errors import RecipeError
from isoprune_hf.terminal import suggest

EXPECTED = ("gmacs", "params_m", "top1")
_SETTINGS = {name: {field.name for field in fields(section)} for name, section in SECTIONS.items()}
_FLAGS = {flag[0] for stage in STAGES.values() for flag in stage.flags}
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
    """Read a recipe file with all that it extends; `file` is a path or the name of a published recipe.

    Returns:
        Section -> its settings, as far as they are given; flags of stages; `source` and `expect`.

    Raises:
        RecipeError: A file cannot be read, extends itself, or holds what no stage knows; values are checked later.
    """
    return _read(find_recipe(file), ())


def select_stage(recipe: dict[str, Any], stage: str) -> dict[str, Any]:
    """Pick what a stage reads of a recipe: one file serves all stages; its flags are those of `run`."""
    wanted = set(STAGES[stage].sections.split())
    if stage == "run":
        wanted |= {flag[0] for flag in STAGES[stage].flags}
    return {name: value for name, value in recipe.items() if name in wanted}


def _read(file: Path, above: tuple[Path, ...]) -> dict[str, Any]:
    if file.resolve() in (path.resolve() for path in above):
        raise RecipeError(f"--config: {' extends '.join(str(path) for path in (*above, file))}, which never ends")
    try:
        values = get_loader("yaml")(file.read_text(encoding="utf-8"))
        json.dumps(values)  # plain values, and none that holds itself
    except OSError as error:
        reason = f"the recipe file {file} cannot be read ({error.strerror})"
        by = f"; {above[-1]} extends it, by a path from its own folder" if above else ""
        raise RecipeError(f"--config: {reason}{by}") from error
    except (TypeError, ValueError, RecursionError, yaml.YAMLError) as error:
        raise RecipeError(f"--config: {file} is not YAML: {error}") from error
    if not isinstance(values, dict):
        raise RecipeError(f"--config: {file} must hold sections, as prune, data and finetune")
    _check(file, values)
    if "extends" not in values:
        return values
    base = _read(file.parent / values.pop("extends"), (*above, file))
    return _merge({name: value for name, value in base.items() if name not in _NOTES}, values)


def _merge(base: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """Put the changes over the base; where both have a mapping, key by key."""
    both = {
        key: _merge(base[key], value) if isinstance(value, dict) and isinstance(base.get(key), dict) else value
        for key, value in changes.items()
    }
    return {**base, **both}


def _check(file: Path, values: dict[str, Any]) -> None:
    known = (*SECTIONS, *_NOTES, *sorted(_FLAGS))
    for name, section in values.items():
        if name not in known:
            raise RecipeError(f"--config: {file} has an unknown section {name!r}{suggest(str(name), known, limit=1)}")
        if name in (*SECTIONS, "expect") and not isinstance(section, dict):
            raise RecipeError(f"--config: section {name} of {file} must hold settings, got {section!r}")
        if name in ("extends", "source") and not (isinstance(section, str) and section):
            what = "the path of a recipe file" if name == "extends" else "a text"
            raise RecipeError(f"--config: {name} of {file} must be {what}, got {section!r}")
        keys = _SETTINGS.get(name, EXPECTED)
        for key in section if isinstance(section, dict) and name in (*SECTIONS, "expect") else ():
            if key not in keys:
                near = suggest(f"{name}.{key}", [f"{name}.{known_key}" for known_key in keys], limit=1)
                raise RecipeError(f"--config: {file} has an unknown setting {name}.{key}{near}")
    for key, value in values.get("expect", {}).items():
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < float("inf"):
            raise RecipeError(f"--config: expect.{key} of {file} must be a number above 0, got {value!r}")
