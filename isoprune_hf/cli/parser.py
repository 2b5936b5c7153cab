"""Parse the command line: stage, recipe files and flags; see `parse`."""

import argparse
import itertools
import json
import re
import sys
from pathlib import Path
from typing import Any, NoReturn

from jsonargparse import ArgumentParser, Namespace

from isoprune_hf.cli.help import TEXT, USAGE, describe_stages
from isoprune_hf.cli.recipe_files import read_recipe, select_stage
from isoprune_hf.cli.short_flags import expand
from isoprune_hf.cli.spelling import describe_wrong_value, suggest_flag
from isoprune_hf.cli.stage_help import describe_stage
from isoprune_hf.cli.table import GROUPS, HEADINGS, SECTIONS, STAGES, SWITCHES
from isoprune_hf.commands.stage import Stage, StageGroup
from isoprune_hf.errors import IsoPruneError, RecipeError
from isoprune_hf.recipes import recipe_to_dict
from isoprune_hf.terminal import suggest
from isoprune_hf.version import __version__

EMBEDDED_RECIPE = Path(__file__).parents[1] / "recipes" / "digits.yaml"
_OPTIONS_WITHOUT_STAGE = ("-h", "--help", "--version", "--completion")
_SYNONYMS = {
    **dict.fromkeys(("train", "fit", "tune"), "finetune"),
    **dict.fromkeys(("cut", "compress", "shrink"), "prune"),
    **dict.fromkeys(("eval", "test", "validate"), "evaluate"),
    **dict.fromkeys(("upload", "publish"), "push"),
}
_STAGES_WITH_EMBEDDED_RECIPE = ("run", "score", "prune")


class _Parser(ArgumentParser):
    """Raises an error of one line, and prints resolved recipes."""

    stage = ""  # its name; empty for `isoprune` and for a group

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Raise the message as an IsoPruneError, with a suggestion for an unknown flag or value."""
        message = " ".join(message.split())
        unknown = re.search(r"unrecognized arguments: --([\w.-]+)", message)
        wrong = re.match(r'Parser key "([\w.]+)": .*(?:Got|Given) value: (.*)$', message)
        if unknown:
            message += suggest_flag(self.stage, unknown[1])
        elif wrong:
            message = describe_wrong_value(self.stage, wrong[1], wrong[2]) or message
        raise IsoPruneError(message)

    def dump(self, namespace: Namespace, *arguments: Any, **options: Any) -> str:
        """Return the values that a recipe resolves to, with those of presets and defaults."""
        resolved = self.instantiate_classes(namespace)
        if "prune" in resolved:
            prune, data = resolved["prune"], resolved["data"]
            has_images = data.dataset is not None or prune.reads_images == "criterion"
            resolved["prune"] = prune.settled(has_images=has_images)
        for name in SECTIONS:
            if name in resolved:
                resolved[name] = _namespace(recipe_to_dict(resolved[name]))
        return str(super().dump(resolved, *arguments, **options))


class _TopParser(_Parser):
    """Prints the help of `isoprune --help`, which needs no parser."""

    def format_help(self, formatter: argparse.HelpFormatter | None = None) -> str:
        """Return the help of all stages."""
        return describe_stages()


class _Completion(argparse.Action):
    """Prints a completion script for a shell."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> NoReturn:
        """Print the script and end the process: making it uses the parser up."""
        sys.stdout.write(parser.get_completion_script(f"shtab-{values}"))
        sys.exit(0)


def parse(arguments: list[str]) -> tuple[str, Namespace]:
    """Parse arguments into the name of a stage, and its recipe sections and flags.

    Raises:
        RecipeError: A value is out of its range or contains NUL, or a recipe file cannot be read.
    """
    stage, flags = _split_stage(arguments)
    if stage in STAGES:
        parser = stage_parser(STAGES[stage])
        if "--help-all" in flags:
            flags = ["--help"]
        elif {"-h", "--help"} & {*flags}:
            sys.stdout.write(describe_stage(STAGES[stage], parser))
            sys.exit(0)
        flags = expand(stage, _name_positionals(stage, flags))
        flags = _recipes_first(stage, _bracket_lists(stage, flags))
    else:  # help, completion or version
        parser, flags = build_parser(), [*stage.split(), *flags]
    parsed = parser.parse_args(flags)
    for name, value in parsed.items():
        if isinstance(value, str) and "\0" in value:  # which no path can contain
            raise RecipeError(f"{name} contains the sign NUL, got {value!r:.99}; remove it")
    return stage, parser.instantiate_classes(parsed)


def _split_stage(arguments: list[str]) -> tuple[str, list[str]]:
    """Split off the stage, one or two words at the front; without one it is `run`."""
    first = arguments[0] if arguments else ""
    if first.partition("=")[0] in _OPTIONS_WITHOUT_STAGE:
        return "", arguments
    if first.startswith("-") or not first:
        return "run", arguments
    if first in STAGES:
        return first, arguments[1:]
    if first not in GROUPS:
        known = [name for names in HEADINGS.values() for name in names]
        meant = f"; did you mean {_SYNONYMS[first]}?" if first in _SYNONYMS else suggest(first, known, limit=1)
        raise RecipeError(f"unknown stage {first!r}; stages are {', '.join(known)}{meant}")
    second = arguments[1] if len(arguments) > 1 else ""
    if second in ("-h", "--help"):
        return first, arguments[1:]
    if f"{first} {second}" in STAGES:
        return f"{first} {second}", arguments[2:]
    actions = [stage.name.split()[1] for stage in GROUPS[first].stages]
    raise RecipeError(f"{first} needs one of {', '.join(actions)}, got {second!r}{suggest(second, actions, limit=1)}")


def _name_positionals(stage: str, flags: list[str]) -> list[str]:
    """Insert the names of positional flags before their values."""
    named: list[str] = []
    for name, value in zip(STAGES[stage].positional, flags, strict=False):
        if value.startswith("-"):
            break
        named += [f"--{name}", value]
    return [*named, *flags[len(named) // 2 :]]


def _bracket_lists(stage: str, flags: list[str]) -> list[str]:
    """Add brackets to lists that are given without them: 1,16 becomes [1,16]."""
    names = {f"--{flag.name}" for flag in STAGES[stage].flags if flag.is_list}
    bracketed = []
    for before, word in itertools.pairwise(["", *flags]):
        name, is_joined, value = word.partition("=")
        if before in names and not word.startswith(("[", "-")):
            word = f"[{word}]"
        elif is_joined and name in names and not value.startswith("["):
            word = f"{name}=[{value}]"
        bracketed.append(word)
    return bracketed


def _recipes_first(stage: str, arguments: list[str]) -> list[str]:
    """Move the content of recipe files before all flags, so that a flag before or after `--config` overrides it."""
    if stage in _STAGES_WITH_EMBEDDED_RECIPE and not any(
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
    """Build the parser of all stages: a sub-command for each, a group of flags for each section of a recipe."""
    parser = _TopParser(prog="isoprune", usage=USAGE, description=TEXT)
    parser.add_argument("--version", action="version", version=f"isoprune {__version__}")
    parser.add_argument("--completion", action=_Completion, choices=["bash", "zsh"], default=argparse.SUPPRESS)
    stages = parser.add_subcommands(dest="stage", title="stages", description="", metavar="STAGE")
    for name in (name for names in HEADINGS.values() for name in names):
        if name in GROUPS:
            _add_group(stages, GROUPS[name])
        else:
            stages.add_subcommand(name, stage_parser(STAGES[name]), help=STAGES[name].text)
    return parser


def _add_group(stages: Any, group: StageGroup) -> None:
    """Add a sub-command with a sub-command for each action; jsonargparse wants the outer one first."""
    parser = _Parser(description=group.text, usage=f"isoprune {group.name} ACTION [FLAGS]")
    stages.add_subcommand(group.name, parser, help=group.text)
    actions = parser.add_subcommands(dest="action", title="actions", description="", metavar="ACTION")
    for stage in group.stages:
        actions.add_subcommand(stage.name.split()[1], stage_parser(stage), help=stage.text)


def stage_parser(stage: Stage) -> ArgumentParser:
    """Build the parser of one stage; those of all stages take 0.2 s."""
    words = [f"isoprune {stage.name}", *(name.rpartition(".")[2].upper() for name in stage.positional)]
    words += ["[--config RECIPE.yaml]"] if stage.sections else []
    parser = _Parser(description=stage.text, usage=" ".join([*words, "[FLAGS]"]))
    parser.stage = stage.name
    if stage.sections:
        parser.add_argument("--config", action="config", help="Recipe file; flags override its values.")
    for flag in stage.flags:
        if flag.required:
            parser.add_argument(f"--{flag.name}", type=flag.type, required=True, help=flag.text)
        else:
            parser.add_argument(f"--{flag.name}", type=flag.type, default=flag.default, help=flag.text)
    for name, text in SWITCHES.items():
        parser.add_argument(f"--{name}", action="store_true", default=argparse.SUPPRESS, help=text)
    for section in stage.sections:
        parser.add_class_arguments(SECTIONS[section], section)
    return parser


def _namespace(values: dict[str, Any]) -> Namespace:
    return Namespace(values)  # type: ignore[no-untyped-call]  # jsonargparse does not annotate it
