"""Suggest the flag that was meant (`suggest_flag`), and describe what a flag takes (`describe_wrong_value`)."""

from collections.abc import Iterable
from typing import Any, Literal, get_args, get_origin

from isoprune_hf.cli.short_flags import short_name, types_of
from isoprune_hf.cli.table import SWITCHES
from isoprune_hf.terminal import suggest

_GENERAL = ("config", "help", "help-all", "version", *SWITCHES)
_SYNONYMS = {
    **dict.fromkeys(("lr", "rate"), "learning-rate"),
    **dict.fromkeys(("workers", "threads"), "num-workers"),
    **dict.fromkeys(("out", "out-dir", "output-dir", "save", "save-dir"), "output"),
    **dict.fromkeys(("dir", "data-dir", "data-path", "images"), "data"),
    **dict.fromkeys(("force", "exist-ok"), "overwrite"),
    **dict.fromkeys(("macs", "flops", "target-flops"), "target-macs"),
    **dict.fromkeys(("params", "parameters"), "target-params"),
    **dict.fromkeys(("latency", "speed"), "target-latency"),
    **dict.fromkeys(("checkpoint", "ckpt", "pretrained-path"), "weights"),
    **dict.fromkeys(("quantize", "dtype", "int8", "fp16"), "precision"),
}
_KINDS: dict[Any, str] = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}
_KINDS_IN_LIST: dict[Any, str] = {int: "whole numbers", float: "numbers", str: "texts"}
_MOST_SHOWN = 60  # characters of a value


def suggest_flag(stage: str, given: str) -> str:
    """Return the end of an error message that names the flag of a stage that was meant, if one is near.

    Args:
        stage: Name of the stage; empty for `isoprune` itself.
        given: The unknown flag, without its leading dashes.
    """
    full = list(types_of(stage)) if stage else []
    if "." in given:
        return _as_flag(suggest(given.replace("-", "_"), full, limit=1))
    short = {short_name(stage, name) for name in full}
    short |= {form for name in full if (form := name.rpartition(".")[2].replace("_", "-")) not in short}
    word = given.replace("_", "-")
    meant = _SYNONYMS.get(word.lower())
    return f"; did you mean --{meant}?" if meant in short else _as_flag(suggest(word, [*short, *_GENERAL], limit=1))


def describe_wrong_value(stage: str, name: str, value: str) -> str | None:
    """Return an error message that says what a flag of a stage takes; None for a type that has no short name.

    Args:
        stage: Name of the stage.
        name: Full name of the flag, such as prune.round_to.
        value: The value that was given.
    """
    kind = types_of(stage).get(name)
    choices = [str(choice) for choice in _choices(kind)]
    is_list = any(get_origin(part) is list for part in (kind, *get_args(kind)))
    names = _KINDS_IN_LIST if is_list else _KINDS
    kinds = [text for part in _parts(kind) if (text := names.get(part))]
    if not choices and not kinds:
        return None
    allowed = " or ".join([*kinds, *([", ".join(choices)] if choices else [])])
    if is_list:
        allowed = f"a list of {allowed}"
    elif len(choices) > 1 and not kinds:
        allowed = f"one of {allowed}"
    return f"{name} must be {allowed}, got {value[:_MOST_SHOWN]!r}{suggest(value, choices, limit=1)}"


def _as_flag(suggestion: str) -> str:
    return suggestion.replace("did you mean ", "did you mean --")


def _parts(kind: Any) -> list[Any]:
    """Return the types that a union or a list is made of."""
    if get_origin(kind) in (Literal, dict) or not get_args(kind):
        return [kind]
    return [part for member in get_args(kind) for part in _parts(member)]


def _choices(kind: Any) -> Iterable[Any]:
    """Return the literal values of a type."""
    return [value for part in _parts(kind) if get_origin(part) is Literal for value in get_args(part)]
