"""How the command line is read: stage, recipe files and flags."""

import argparse
import itertools
import json
import re
import sys
from pathlib import Path
from typing import Any, NoReturn, get_origin

from jsonargparse import ArgumentParser, Namespace

from isoprune_hf.cli.help import TEXT, USAGE, describe_stages
from isoprune_hf.cli.recipe_files import read_recipe, select_stage
from isoprune_hf.cli.table import ACTIONS, SECTIONS, STAGES, SWITCHES, Stage
from isoprune_hf.errors import IsoPruneError, RecipeError
from isoprune_hf.recipes import recipe_to_dict
from isoprune_hf.terminal import suggest
from isoprune_hf.version import __version__

EMBEDDED_RECIPE = Path(__file__).parents[1] / "recipes" / "digits.yaml"
_ABOVE_STAGES = ("-h", "--help", "--version", "--completion")


class _Parser(ArgumentParser):
    """Says in one line what is wrong."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        message = " ".join(message.split())
        unknown = re.search(r"unrecognized arguments: --([\w.]+)", message)
        if unknown:
            message += suggest(unknown[1], [action.dest for action in self._actions], limit=1)
        raise IsoPruneError(message)

    def dump(self, namespace: Namespace, *arguments: Any, **options: Any) -> str:
        """Write what a recipe resolves to, not what it was given: presets and defaults give settings values."""
        resolved = self.instantiate_classes(namespace)
        for name in SECTIONS:
            if name in resolved:
                resolved[name] = Namespace(recipe_to_dict(resolved[name]))
        return super().dump(resolved, *arguments, **options)


class _TopParser(_Parser):
    """Has the help that needs no parser."""

    def format_help(self) -> str:
        return describe_stages()


class _Completion(argparse.Action):
    """Prints a script for a shell."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> NoReturn:
        sys.stdout.write(parser.get_completion_script(f"shtab-{values}"))
        sys.exit(0)  # the script has used the parser up


def parse(arguments: list[str]) -> tuple[str, Namespace]:
    """Turn arguments into a stage, and its recipes and flags.

    Raises:
        RecipeError: A value is out of its range, or a recipe file cannot be read.
    """
    stage, flags = _split_stage(arguments)
    if stage in STAGES:
        flags = _recipe_first(stage, _bracket_lists(stage, _name_positionals(stage, flags)))
    parser = build_parser()
    config = parser.instantiate_classes(parser.parse_args([*stage.split(), *flags]))
    for word in stage.split():
        config = config[word]
    return stage, config


def _split_stage(arguments: list[str]) -> tuple[str, list[str]]:
    """Take the stage, of one word or two, from the front; without one it is `run`."""
    first = arguments[0] if arguments else ""
    if first.partition("=")[0] in _ABOVE_STAGES:
        return "", arguments
    if first.startswith("-") or not first:
        return "run", arguments
    if first in STAGES:
        return first, arguments[1:]
    known = [stage for stage in STAGES if " " not in stage] + list(ACTIONS)
    if first not in ACTIONS:
        raise RecipeError(f"unknown stage {first!r}; stages are {', '.join(known)}{suggest(first, known, limit=1)}")
    second = arguments[1] if len(arguments) > 1 else ""
    if second in ("-h", "--help") or f"{first} {second}" in STAGES:
        is_help = second.startswith("-")
        return (first, arguments[1:]) if is_help else (f"{first} {second}", arguments[2:])
    actions = [stage.split()[1] for stage in STAGES if stage.startswith(f"{first} ")]
    raise RecipeError(f"{first} needs one of {', '.join(actions)}, got {second!r}{suggest(second, actions, limit=1)}")


def _name_positionals(stage: str, flags: list[str]) -> list[str]:
    named: list[str] = []
    for name, value in zip(STAGES[stage].positional, flags, strict=False):
        if value.startswith("-"):
            break
        named += [f"--{name}", value]
    return [*named, *flags[len(named) // 2 :]]


def _bracket_lists(stage: str, flags: list[str]) -> list[str]:
    """Let lists be written as people write them: 1,16 for [1,16]."""
    names = {f"--{name}" for name, kind, *_ in STAGES[stage].flags if get_origin(kind) is list}
    written = []
    for before, word in itertools.pairwise(["", *flags]):
        name, is_joined, value = word.partition("=")
        if before in names and not word.startswith(("[", "-")):
            word = f"[{word}]"
        elif is_joined and name in names and not value.startswith("["):
            word = f"{name}=[{value}]"
        written.append(word)
    return written


def _recipe_first(stage: str, arguments: list[str]) -> list[str]:
    """Put the content of recipe files before all flags, so that a flag wins wherever it stands."""
    if stage in ("run", "score", "prune") and not any(
        re.match(r"--(config|prune\.model|prune)(=|$)|-h$|--help$", argument) for argument in arguments
    ):
        arguments = ["--config", str(EMBEDDED_RECIPE), *arguments]
    recipes, flags = [], []
    rest = iter(arguments)
    for argument in rest:
        if argument == "--config" or argument.startswith("--config="):
            file = argument.partition("=")[2] or next(rest, "")
            recipes += ["--config", json.dumps(select_stage(read_recipe(file), stage))]
        else:
            flags.append(argument)
    return [*recipes, *flags]


def build_parser() -> ArgumentParser:
    """Build the parser: a sub-command for each stage, a group of flags for each section of a recipe."""
    parser = _TopParser(prog="isoprune", usage=USAGE, description=TEXT)
    parser.add_argument("--version", action="version", version=f"isoprune {__version__}")
    parser.add_argument("--completion", action=_Completion, choices=["bash", "zsh"], default=argparse.SUPPRESS)
    stages = parser.add_subcommands(dest="stage", title="stages", description="", metavar="STAGE")
    actions = {}
    for name, stage in STAGES.items():
        first, _, action = name.partition(" ")
        if not action:
            stages.add_subcommand(first, _stage_parser(name, stage), help=stage.text)
            continue
        if first not in actions:
            above = _Parser(description=ACTIONS[first], usage=f"isoprune {first} ACTION [FLAGS]")
            stages.add_subcommand(first, above, help=ACTIONS[first])
            actions[first] = above.add_subcommands(dest="action", title="actions", description="", metavar="ACTION")
        actions[first].add_subcommand(action, _stage_parser(name, stage), help=stage.text)
    return parser


def _stage_parser(name: str, stage: Stage) -> ArgumentParser:
    words = [f"isoprune {name}", *map(str.upper, stage.positional)]
    parser = _Parser(
        description=stage.text, usage=" ".join([*words, *["[--config RECIPE.yaml]"] * bool(stage.sections), "[FLAGS]"])
    )
    if stage.sections:
        parser.add_argument("--config", action="config", help="Recipe file; a flag wins over it.")
    for flag, kind, default, help_text in stage.flags:
        if default is None and kind is str:
            parser.add_argument(f"--{flag}", type=kind, required=True, help=help_text)
        else:
            parser.add_argument(f"--{flag}", type=kind, default=default, help=help_text)
    for name, text in SWITCHES.items():
        if name != "json" or stage.has_figures:
            parser.add_argument(f"--{name}", action="store_true", default=argparse.SUPPRESS, help=text)
    for section in stage.sections.split():
        parser.add_class_arguments(SECTIONS[section], section)
    return parser
