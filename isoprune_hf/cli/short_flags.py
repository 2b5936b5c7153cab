"""Write out what users type: `--target-macs 50% --data DIR` for `--prune.target_macs 50% --data.dataset DIR`.

`expand` returns the flags that the parser knows; `short_name` is the shortest form of one of them.
"""

import itertools
from collections.abc import Sequence
from functools import cache
from typing import Any, get_args, get_type_hints

from isoprune_hf.cli.table import SECTIONS, STAGES
from isoprune_hf.errors import RecipeError

_ALIASES = {"data": "data.dataset", "runtime": "prune.latency_backend"}


def expand(stage: str, words: Sequence[str]) -> list[str]:
    """Write out the flags of a stage.

    A setting may be named without its section if no other section of the stage has one of that name, with dashes in
    place of underscores. A switch needs no value: `--overwrite` is true, `--no-rotate` is false.

    Raises:
        RecipeError: Several settings have the name.
    """
    names = types_of(stage)
    expanded = []
    for word, following in itertools.pairwise([*words, "--"]):
        if not word.startswith("--"):
            expanded.append(word)
            continue
        given, is_joined, value = word[2:].partition("=")
        name = given if given == "data" and (value or following).startswith("{") else _resolve(given, names)
        positive = _resolve(given.removeprefix("no-"), names)
        if name not in names and given.startswith("no-") and _is_switch(names.get(positive)):
            expanded += [f"--{positive}", "false"]
        elif is_joined:
            expanded.append(f"--{name}={value}")
        else:
            needs_value = _is_switch(names.get(name)) and following.startswith("-")
            expanded += [f"--{name}", *(["true"] if needs_value else [])]
    return expanded


def short_name(stage: str, name: str) -> str:
    """Return the shortest form of a flag of a stage, without its leading dashes."""
    names = types_of(stage)
    forms = [alias for alias, target in _ALIASES.items() if target == name]
    forms += [form for form in (name.rpartition(".")[2], name) if form == name or _candidates(form, names) == [name]]
    return forms[0].replace("_", "-")


@cache
def types_of(stage: str) -> dict[str, Any]:
    """Return the annotation of every flag of a stage, by its name in full."""
    declared = STAGES[stage]
    types = {flag.name: flag.type for flag in declared.flags}
    for section in declared.sections:
        types |= {f"{section}.{name}": kind for name, kind in get_type_hints(SECTIONS[section]).items()}
    return types


def _resolve(given: str, names: dict[str, Any]) -> str:
    """Return the full name of a flag, or the given one if it is not known."""
    if _ALIASES.get(given) in names:
        return _ALIASES[given]
    name = given.replace("-", "_")
    if name in names:
        return name
    found = _candidates(name, names)
    if len(found) > 1:
        raise RecipeError(f"--{given} may be {' or '.join(f'--{name}' for name in found)}: write one of them in full")
    return found[0] if found else given


def _candidates(name: str, names: dict[str, Any]) -> list[str]:
    if name in names:
        return [name]
    return [known for known in names if known.partition(".")[2] == name]


def _is_switch(kind: Any) -> bool:
    return kind is bool or set(get_args(kind)) == {bool, type(None)}
