"""The command line: `isoprune [STAGE] [FLAGS]`, and the same for `accelerate launch train_accelerate.py`."""

import argparse
import difflib
import importlib
import json
import logging
import os
import re
import sys
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, NoReturn

import yaml
from accelerate import Accelerator
from jsonargparse import ArgumentParser, Namespace, get_loader
from transformers.utils import logging as transformers_logging

from isoprune_hf.errors import IsoPruneError, RecipeError
from isoprune_hf.recipes import DataRecipe, FinetuneRecipe, PretrainRecipe, PruneRecipe
from isoprune_hf.version import __version__

EMBEDDED_RECIPE = Path(__file__).with_name("digits.yaml")
SECTIONS = {"prune": PruneRecipe, "data": DataRecipe, "pretrain": PretrainRecipe, "finetune": FinetuneRecipe}
# Stage: sections of a recipe, other flags (name, type, default, text), and what it does.
_OUTPUT = "Where the result is written; it appears when it is complete."
_OVERWRITE = ("overwrite", bool, False, "Replace what lies at OUTPUT.")
_MODEL = "A folder, or a name as for prune.model."
STAGES: dict[str, tuple[str, list[tuple[str, Any, Any, str]], str]] = {
    "run": (
        "prune data pretrain finetune",
        [("output", str, "output/run", _OUTPUT), _OVERWRITE],
        "Take the whole road (default): score, cut, finetune with a teacher, evaluate, write OUTPUT/model.",
    ),
    "score": (
        "prune data",
        [("output", str, "output/importance.safetensors", _OUTPUT), _OVERWRITE],
        "Score the channels of a base and keep the scores, for any number of cuts.",
    ),
    "prune": (
        "prune data",
        [
            ("output", str, "output/pruned", _OUTPUT),
            _OVERWRITE,
            ("scores", str | None, None, "File of `isoprune score` to cut from, instead of scoring anew."),
        ],
        "Cut a base to ratios or to a budget and write the folder OUTPUT.",
    ),
    "finetune": (
        "data finetune",
        [("model", str, None, _MODEL), ("output", str, "output/finetuned", _OUTPUT), _OVERWRITE],
        "Train the pruned model in the folder MODEL and write the folder OUTPUT.",
    ),
    "evaluate": ("data", [("model", str, None, _MODEL)], "Evaluate MODEL; a folder of ours keeps the figures."),
    "inspect": (
        "",
        [("model", str, None, _MODEL), ("output", str | None, None, "PNG file for a picture of the classes.")],
        "List the isomorphic classes of MODEL, and what its plan keeps of each.",
    ),
    "push": (
        "",
        [
            ("folder", str, None, "Folder of a pruned model."),
            ("repo", str, None, "Repository, as user/name; it is made when it is not there."),
            ("private", bool, False, "Make the repository private."),
        ],
        "Upload a folder to the Hugging Face Hub in one commit, model card included.",
    ),
}
_EPILOG = """examples:
  isoprune
      the embedded default: real handwritten digits and a small ViT, in two minutes
  isoprune prune --prune.model timm/resnet50.a1_in1k --prune.criterion l1 --prune.target_macs 50% --output pruned
      a ResNet-50 with half of its MACs, from its weights alone
  accelerate launch train_accelerate.py --config recipe.yaml --data.dataset ILSVRC/imagenet-1k
      score, cut and finetune on every GPU of the machine
"""


def _like(name: str, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(name, list(known), n=1)
    return f"; did you mean {near[0]}?" if near else ""


class _Parser(ArgumentParser):
    """Says in one line what is wrong, and exits with 2."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        message = " ".join(message.split())
        unknown = re.search(r"unrecognized arguments: --([\w.]+)", message)
        if unknown:
            message += _like(unknown[1], [action.dest for action in self._actions])
        _fail(message)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        arguments: Instead of those of the process.

    Returns:
        0: done. Bad input exits with 2, Ctrl-C with 130.
    """
    try:
        config = parse(list(sys.argv[1:] if arguments is None else arguments))
        text = _run(config.stage, config[config.stage])
    except IsoPruneError as error:
        _fail(str(error))
    except KeyboardInterrupt:
        sys.exit(130)
    if text and os.environ.get("RANK", "0") == "0":
        print(text)
    return 0


def parse(arguments: list[str]) -> Namespace:
    """Turn arguments into `stage` and, below its name, recipes and flags.

    Raises:
        RecipeError: A value is out of its range, or a recipe file cannot be read.
    """
    first = arguments[0] if arguments else ""
    if first and not first.startswith("-") and first not in STAGES:
        raise RecipeError(f"unknown stage {first!r}; stages are {', '.join(STAGES)}{_like(first, STAGES)}")
    if first not in {*STAGES, "-h", "--help", "--version"}:
        arguments = ["run", *arguments]
    if arguments[0] == "push" and len(arguments) > 1 and not arguments[1].startswith("-"):
        arguments = ["push", "--folder", *arguments[1:]]
    if arguments[0] in ("run", "score", "prune") and not any(
        re.match(r"--(config|prune\.model|prune)(=|$)|-h$|--help$", argument) for argument in arguments
    ):
        arguments = [arguments[0], "--config", str(EMBEDDED_RECIPE), *arguments[1:]]
    arguments = _recipe_first(arguments)
    parser = build_parser()
    return parser.instantiate_classes(parser.parse_args(arguments))


def _recipe_first(arguments: list[str]) -> list[str]:
    """Put the content of recipe files before all flags, so that a flag wins wherever it stands."""
    recipes, flags = [], []
    rest = iter(arguments[1:])
    for argument in rest:
        if argument == "--config" or argument.startswith("--config="):
            file = argument.partition("=")[2] or next(rest, "")
            recipes += ["--config", _read_recipe(arguments[0], file)]
        else:
            flags.append(argument)
    return [arguments[0], *recipes, *flags]


def _read_recipe(stage: str, file: str) -> str:
    """Read a recipe file; sections of other stages are left out, so one file serves all stages."""
    try:
        values = get_loader("yaml")(Path(file).read_text())
    except OSError as error:
        raise RecipeError(f"--config: the recipe file {file} cannot be read ({error.strerror})") from error
    except (ValueError, yaml.YAMLError) as error:
        raise RecipeError(f"--config: {file} is not YAML: {error}") from error
    sections, flags, _ = STAGES[stage]
    known = {*SECTIONS, *(flag[0] for _, others, _ in STAGES.values() for flag in others)}
    if not isinstance(values, dict):
        raise RecipeError(f"--config: {file} must hold sections, as prune, data and finetune")
    for name, section in values.items():
        if name not in known:
            raise RecipeError(f"--config: {file} has an unknown section {name!r}{_like(str(name), known)}")
        if name in SECTIONS and not isinstance(section, dict):
            raise RecipeError(f"--config: section {name} of {file} must hold settings, got {section!r}")
        keys = {field.name for field in fields(SECTIONS[name])} if name in SECTIONS else set()
        for key in section if name in SECTIONS else ():
            if key not in keys:
                near = _like(f"{name}.{key}", [f"{name}.{known_key}" for known_key in keys])
                raise RecipeError(f"--config: {file} has an unknown setting {name}.{key}{near}")
    mine = {*sections.split(), *(flag[0] for flag in flags)} if stage == "run" else set(sections.split())
    return json.dumps({name: value for name, value in values.items() if name in mine})


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
    for stage, (sections, flags, text) in STAGES.items():
        stages.add_subcommand(stage, _stage_parser(stage, sections.split(), flags, text), help=text)
    return parser


def _stage_parser(
    stage: str, sections: list[str], flags: list[tuple[str, Any, Any, str]], text: str
) -> ArgumentParser:
    usage = f"isoprune {stage}" + (" [--config RECIPE.yaml]" if sections else "") + " [FLAGS]"
    parser = _Parser(description=text, usage=usage)
    if sections:
        parser.add_argument("--config", action="config", help="Recipe file; a flag wins over it.")
    for name, kind, default, help_text in flags:
        if default is None and kind is str:
            parser.add_argument(f"--{name}", type=kind, required=True, help=help_text)
        else:
            parser.add_argument(f"--{name}", type=kind, default=default, help=help_text)
    for section in sections:
        parser.add_class_arguments(SECTIONS[section], section)
    return parser


def _run(stage: str, config: Namespace) -> str:
    values = {name: config[name] for name in (*STAGES[stage][0].split(), *(flag[0] for flag in STAGES[stage][1]))}
    _quiet_libraries()
    if stage == "push":
        hub = importlib.import_module("isoprune_hf.publishing.hub")
        return hub.push_folder(values["folder"], values["repo"], private=values["private"])
    stages = importlib.import_module("isoprune_hf.stages")
    if stage == "inspect":
        return stages.run_inspect(**values)
    accelerator = Accelerator()
    level = logging.INFO if accelerator.is_main_process else logging.ERROR
    handler = logging.StreamHandler(sys.stdout)
    handler.setFormatter(_Plain("%(message)s"))
    logging.basicConfig(level=logging.WARNING, handlers=[handler], force=True)
    logging.getLogger("isoprune_hf").setLevel(level)
    work = {"run": stages.run_all}.get(stage) or getattr(stages, f"run_{stage}")
    try:
        return work(accelerator, **values)
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


def _fail(message: str) -> NoReturn:
    if os.environ.get("RANK", "0") == "0":
        print(f"isoprune: error: {' '.join(message.split())}", file=sys.stderr)
    sys.exit(2)
