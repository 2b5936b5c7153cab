"""What the command line says of itself before a stage is named; it needs no extra."""

import sys
import textwrap

from isoprune_hf.cli.table import ACTIONS, EXIT_CODES, GROUPS, STAGES, SWITCHES
from isoprune_hf.terminal import paint
from isoprune_hf.version import __version__

USAGE = "isoprune [STAGE] [--config RECIPE.yaml] [--SECTION.KEY VALUE ...]"
TEXT = "Prune image classifiers by isomorphic classes, finetune them, and open them anywhere."
_EXAMPLES = """  isoprune
      the embedded default: real handwritten digits and a small ViT, in two minutes
  isoprune prune --prune.model timm/resnet50.a1_in1k --prune.criterion l1 --prune.target_macs 50% --output pruned
      a ResNet-50 with half of its MACs, from its weights alone
  accelerate launch train_accelerate.py --config recipe.yaml --data.dataset ILSVRC/imagenet-1k
      score, cut and finetune on every GPU of the machine"""
_OPTIONS = {
    "-h, --help": "This text; isoprune STAGE --help lists the flags of a stage.",
    "--version": "The version.",
    "--completion SHELL": 'Completion for bash or zsh: eval "$(isoprune --completion bash)"',
    **{f"STAGE --{name}": text for name, text in SWITCHES.items()},
}
_WIDTH = 100


def take_switches(arguments: list[str]) -> tuple[list[str], set[str]]:
    """Take the switches that every stage has out of the arguments."""
    flags = {f"--{name}" for name in SWITCHES}
    return [word for word in arguments if word not in flags], {word[2:] for word in arguments if word in flags}


def answer_of(arguments: list[str]) -> str | None:
    """Give the text that is asked for in place of a stage: help or version; None where there is work to do."""
    words, _ = take_switches(arguments)
    if words[:1] == ["--version"]:
        return f"isoprune {__version__}\n"
    return describe_stages() if words[:1] in (["-h"], ["--help"]) else None


def describe_stages() -> str:
    """List the stages in their groups, the options, examples and exit codes."""
    names = dict.fromkeys(name.split()[0] for name in STAGES)
    texts = {name: STAGES[name].text if name in STAGES else ACTIONS[name] for name in names}
    parts = [f"usage: {USAGE}\n\n{TEXT}"]
    for title, members in GROUPS.items():
        parts.append(_section(title, {name: texts[name] for name in members}))
    parts.append(_section("options", _OPTIONS))
    parts.append(f"{_heading('examples')}\n{_EXAMPLES}")
    parts.append(_section("exit codes", {str(code): text for code, text in EXIT_CODES.items()}))
    return "\n\n".join(parts) + "\n"


def _heading(title: str) -> str:
    return paint(f"{title}:", "bold", sys.stdout)


def _section(title: str, texts: dict[str, str]) -> str:
    indent = " " * (6 + max(map(len, texts)))
    lines = []
    for name, text in texts.items():
        lines += textwrap.wrap(text, _WIDTH, initial_indent=f"    {name}".ljust(len(indent)), subsequent_indent=indent)
    return "\n".join([_heading(title), *lines])
