"""The command line: `isoprune [STAGE] [FLAGS]`, and the same for `accelerate launch train_accelerate.py`."""

import argparse
import importlib
import json
import logging
import os
import re
import sys
import warnings
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import NoReturn

import torch
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs
from jsonargparse import ArgumentParser, Namespace
from transformers.utils import logging as transformers_logging

from isoprune_hf.commands import ACTIONS, SECTIONS, STAGES, Stage
from isoprune_hf.errors import Cancelled, Interrupted, IsoPruneError, LostRankError, RecipeError, TrainingFault
from isoprune_hf.extras import naming_extra
from isoprune_hf.recipe_files import like, read_recipe, select_stage
from isoprune_hf.recipes import FinetuneRecipe
from isoprune_hf.version import __version__

EMBEDDED_RECIPE = Path(__file__).with_name("digits.yaml")
_FAILED, _CODE = "isoprune/failed", "isoprune/code"
_EPILOG = """examples:
  isoprune
      the embedded default: real handwritten digits and a small ViT, in two minutes
  isoprune prune --prune.model timm/resnet50.a1_in1k --prune.criterion l1 --prune.target_macs 50% --output pruned
      a ResNet-50 with half of its MACs, from its weights alone
  accelerate launch train_accelerate.py --config recipe.yaml --data.dataset ILSVRC/imagenet-1k
      score, cut and finetune on every GPU of the machine
"""


class _Parser(ArgumentParser):
    """Says in one line what is wrong, and exits with 2."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        message = " ".join(message.split())
        unknown = re.search(r"unrecognized arguments: --([\w.]+)", message)
        if unknown:
            message += like(unknown[1], [action.dest for action in self._actions])
        _fail(message)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        arguments: Instead of those of the process.

    Returns:
        0: done; 1: done, and what was looked for is not so (`doctor`, `plan diff`). Bad input exits with 2, a training
            that cannot go on with the code of its `TrainingFault`, Ctrl-C with 130.
    """
    try:
        with naming_extra("this"):
            text, code = _run(*parse(list(sys.argv[1:] if arguments is None else arguments)))
    except TrainingFault as error:
        _fail(str(error), error.exit_code)
    except IsoPruneError as error:
        _fail(str(error))
    except KeyboardInterrupt:
        sys.exit(130)
    except RuntimeError as error:
        notes = _notes_of_ranks()
        if notes is not None and notes.check([_CODE]):
            sys.exit(int(notes.get(_CODE)))  # this rank lost the one that failed, which has said why
        if not _is_of_a_lost_rank(error):
            raise
        lost = LostRankError(
            "another rank was lost, or has not answered for finetune.rank_minutes; the states that were saved stay, "
            f"and the same command continues ({(str(error).splitlines() or [''])[0][:200]})"
        )
        _fail(str(lost), lost.exit_code)
    if text and os.environ.get("RANK", "0") == "0":
        print(text)
    return code


def parse(arguments: list[str]) -> tuple[str, Namespace]:
    """Turn arguments into a stage, and its recipes and flags.

    Raises:
        RecipeError: A value is out of its range, or a recipe file cannot be read.
    """
    stage, flags = _split_stage(arguments)
    if stage in STAGES:
        flags = _recipe_first(stage, _name_positionals(stage, flags))
    parser = build_parser()
    config = parser.instantiate_classes(parser.parse_args([*stage.split(), *flags]))
    for word in stage.split():
        config = config[word]
    return stage, config


def _split_stage(arguments: list[str]) -> tuple[str, list[str]]:
    """Take the stage, of one word or two, from the front; without one it is `run`."""
    first = arguments[0] if arguments else ""
    if first in ("-h", "--help", "--version"):
        return "", arguments
    if first.startswith("-") or not first:
        return "run", arguments
    if first in STAGES:
        return first, arguments[1:]
    known = [stage for stage in STAGES if " " not in stage] + list(ACTIONS)
    if first not in ACTIONS:
        raise RecipeError(f"unknown stage {first!r}; stages are {', '.join(known)}{like(first, known)}")
    second = arguments[1] if len(arguments) > 1 else ""
    if second in ("-h", "--help") or f"{first} {second}" in STAGES:
        is_help = second.startswith("-")
        return (first, arguments[1:]) if is_help else (f"{first} {second}", arguments[2:])
    actions = [stage.split()[1] for stage in STAGES if stage.startswith(f"{first} ")]
    raise RecipeError(f"{first} needs one of {', '.join(actions)}, got {second!r}{like(second, actions)}")


def _name_positionals(stage: str, flags: list[str]) -> list[str]:
    named: list[str] = []
    for name, value in zip(STAGES[stage].positional, flags, strict=False):
        if value.startswith("-"):
            break
        named += [f"--{name}", value]
    return [*named, *flags[len(named) // 2 :]]


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
    parser = _Parser(
        prog="isoprune",
        usage="isoprune [STAGE] [--config RECIPE.yaml] [--SECTION.KEY VALUE ...]",
        description="Prune image classifiers by isomorphic classes, finetune them, and open them anywhere.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"isoprune {__version__}")
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
    for section in stage.sections.split():
        parser.add_class_arguments(SECTIONS[section], section)
    return parser


def _run(stage: str, config: Namespace) -> tuple[str, int]:
    """Run a stage; returns what to print, and the exit code."""
    names = [*STAGES[stage].sections.split(), *(flag[0] for flag in STAGES[stage].flags)]
    values = {name: config[name] for name in names}
    _quiet_libraries()
    # One process, no log.
    is_local = stage in ("doctor", "plan show", "plan diff", "export", "benchmark", "push")
    places = {"convert": "conversion", "evaluate": "assessment", "frontier": "frontier"}
    places |= dict.fromkeys(("inspect", "plan apply"), "inspection")
    places |= dict.fromkeys(("export", "benchmark", "push"), "deployment")
    place = places.get(stage, "inspection" if is_local else "stages")
    name = "all" if stage == "run" else stage.replace(" ", "_")
    work = getattr(importlib.import_module(f"isoprune_hf.{place}"), f"run_{name}")
    if is_local:
        done = work(**values)
        return done if isinstance(done, tuple) else (done, 0)
    accelerator = _open_accelerator(values.get("finetune"))
    level = logging.INFO if accelerator.is_main_process else logging.ERROR
    handler = logging.StreamHandler(sys.stdout)
    handler.setFormatter(_Plain("%(message)s"))
    logging.basicConfig(level=logging.WARNING, handlers=[handler], force=True)
    logging.getLogger("isoprune_hf").setLevel(level)
    try:
        return work(accelerator, **values), 0
    finally:
        accelerator.end_training()


class _Plain(logging.Formatter):
    """Only the main process logs, so its rank need not stand before every line."""

    def format(self, record: logging.LogRecord) -> str:
        return super().format(record).removeprefix("[RANK 0] ")


def _quiet_libraries() -> None:
    """Leave the terminal to our own lines; bars of the libraries on a terminal only."""
    warnings.filterwarnings("ignore")
    transformers_logging.set_verbosity_error()
    logging.getLogger("huggingface_hub").setLevel(logging.CRITICAL)
    if not sys.stderr.isatty():
        transformers_logging.disable_progress_bar()
        for library in ("HF_DATASETS", "HF_HUB"):
            os.environ.setdefault(f"{library}_DISABLE_PROGRESS_BARS", "1")


def _open_accelerator(finetune: FinetuneRecipe | None) -> Accelerator:
    patience = [] if finetune is None else [InitProcessGroupKwargs(timeout=timedelta(minutes=finetune.rank_minutes))]
    # Without `cpu`, processes on a machine without an accelerator would each be rank 0 of 1.
    accelerator = Accelerator(cpu=not torch.accelerator.is_available(), kwargs_handlers=patience)
    started = int(os.environ.get("WORLD_SIZE", "1"))
    if accelerator.num_processes != started:
        raise RecipeError(
            f"{started} processes were started, but accelerate sees {accelerator.num_processes}; on a machine without "
            "a GPU start them with torchrun"
        )
    return accelerator


def _is_of_a_lost_rank(error: RuntimeError) -> bool:
    """Say whether an error tells of another rank: NCCL's has a type, that of gloo has words alone."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return False
    words = "timed out|connection (closed|reset)|socket|broken pipe"
    return isinstance(error, torch.distributed.DistError) or bool(re.search(words, str(error), re.IGNORECASE))


def _notes_of_ranks() -> torch.distributed.TCPStore | None:
    """Where the ranks leave notes for each other; None for a single process."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return None
    try:
        place = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        return torch.distributed.TCPStore(*place, is_master=False, timeout=timedelta(seconds=5))
    except (KeyError, ValueError, RuntimeError):
        return None


def _fail(message: str, code: int = 2) -> NoReturn:
    """Print one line, on the rank that fails first."""
    if _is_first_to_fail(code):
        line = "".join(sign if sign.isprintable() else ascii(sign)[1:-1] for sign in " ".join(message.split()))
        kind = "" if code in (Interrupted.exit_code, Cancelled.exit_code) else "error: "
        print(f"isoprune: {kind}{line}", file=sys.stderr, flush=True)
    sys.exit(code)


def _is_first_to_fail(code: int) -> bool:
    """Say whether no rank has failed before this one, and leave the code for those that follow it."""
    notes = _notes_of_ranks()
    try:
        if notes is not None:
            notes.set(_CODE, str(code))
            return notes.add(_FAILED, 1) == 1
    except RuntimeError:  # the rank that kept the notes is gone
        pass
    return os.environ.get("RANK", "0") == "0"
