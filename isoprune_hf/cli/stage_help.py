"""Text of `isoprune STAGE --help`: the flags that most users need; see `describe_stage`."""

import re
import textwrap
from typing import Any, Literal, get_args, get_origin

from jsonargparse import ArgumentParser

from isoprune_hf.cli.short_flags import short_name, types_of
from isoprune_hf.cli.table import SWITCHES
from isoprune_hf.commands.stage import Stage

_LINE_LENGTH = 100
_MOST_SHOWN = 12  # flags; a stage with more of them shows the common ones
_COMMON = (
    *("prune.target_macs", "prune.target_params", "prune.target_latency", "prune.preset", "prune.weights"),
    *("data.dataset", "data.eval_split", "finetune.epochs", "finetune.learning_rate", "finetune.teacher"),
    *("scores", "format", "precision", "calibration_images", "output", "overwrite", "push_to_hub"),
)
_METAVARS = {bool: "", int: " N", float: " X", str: " TEXT"}
_OWN_METAVARS = {
    "prune.target_macs": " 50%|4.2G",
    "prune.target_params": " 50%|20M",
    "prune.target_latency": " 50%|12ms",
    "data.dataset": " DIR|hf:NAME",
    "output": " DIR",
    "prune.weights": " FILE",
    "scores": " FILE",
    "push_to_hub": " USER/NAME",
}


def describe_stage(stage: Stage, parser: ArgumentParser) -> str:
    """Return usage, purpose, examples and common flags of a stage.

    Args:
        stage: The stage.
        parser: Its parser, which knows the texts and defaults of all flags.
    """
    words = ["isoprune", stage.name, *(name.rpartition(".")[2].upper() for name in stage.positional), "[FLAGS]"]
    parts = [f"usage: {' '.join(words)}", "\n".join(textwrap.wrap(stage.text, _LINE_LENGTH))]
    if stage.examples:
        parts.append("\n".join(["examples:", *(f"  {example}" for example in stage.examples)]))
    known = types_of(stage.name)
    actions = {action.dest: action for action in parser._actions if action.dest in known}
    names = [name for name in actions if name not in stage.positional]
    shown = names if len(names) <= _MOST_SHOWN else [name for name in _COMMON if name in names]
    lines = ["flags:"]
    for name in shown:
        negation = "no-" if actions[name].default is True else ""
        flag = f"--{negation}{short_name(stage.name, name)}{_metavar(name, known[name])}"
        lines += _line(flag, f"{'Off: ' if negation else ''}{_text(actions[name])}")
    if stage.sections:
        lines += _line("--config FILE", "Recipe file with any of these settings; flags replace its values")
    for name, text in SWITCHES.items():
        lines += _line(f"--{name}", text.rstrip("."))
    rest = f"Also the other {len(names) - len(shown)} flags, with" if len(shown) < len(names) else "With"
    lines += _line("--help-all", f"{rest} types, defaults and the names that recipe files use")
    return "\n\n".join([*parts, "\n".join(lines)]) + "\n"


def _line(flag: str, text: str) -> list[str]:
    indent = " " * 32
    first = f"  {flag}".ljust(len(indent) - 1) + " "
    return textwrap.wrap(text, _LINE_LENGTH, initial_indent=first, subsequent_indent=indent)


def _text(action: Any) -> str:
    """Return the first sentence of a flag's text, with its default."""
    sentence = re.split(r"(?<=[.;])\s", " ".join((action.help or "").split()))[0].rstrip(".;")
    is_plain = isinstance(action.default, str | int | float) and not isinstance(action.default, bool)
    return f"{sentence} ({action.default})" if is_plain else sentence


def _metavar(name: str, kind: Any) -> str:
    if name in _OWN_METAVARS:
        return _OWN_METAVARS[name]
    parts = [part for part in get_args(kind) if part is not type(None)] if get_origin(kind) is not Literal else [kind]
    literals = [str(value) for part in parts or [kind] if get_origin(part) is Literal for value in get_args(part)]
    if literals:
        return f" {'|'.join(literals)}"
    return _METAVARS.get((parts or [kind])[0], " VALUE")
