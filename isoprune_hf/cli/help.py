"""Text of `isoprune --help` and `--version`, for which no extra must be installed; see `answer_of`."""

import textwrap

from isoprune_hf.cli.table import EXIT_CODES, GROUPS, HEADINGS, STAGES, SWITCHES
from isoprune_hf.version import __version__

USAGE = "isoprune [STAGE] [--config RECIPE.yaml] [--SECTION.KEY VALUE ...]"
TEXT = "Prune vision models by isomorphic classes, finetune them, and open them anywhere."
_EXAMPLES = """  isoprune
      the embedded default: real handwritten digits and a small ViT, in one to two minutes
  isoprune prune timm/resnet50.a1_in1k --target-macs 50% --data DIR --output pruned
      a ResNet-50 with half of its MACs, scored and repaired with the images of DIR, not yet finetuned
  accelerate launch -m isoprune_hf run timm/resnet50.a1_in1k --target-macs 50% --data hf:ILSVRC/imagenet-1k
      score, cut and finetune on every GPU of the machine"""
_OPTIONS = {
    "-h, --help": "Show this text; isoprune STAGE --help shows the common flags of a stage, --help-all all.",
    "--version": "Show the version.",
    "--completion SHELL": 'Print completion for bash or zsh: eval "$(isoprune --completion bash)"',
    **{f"STAGE --{name}": text for name, text in SWITCHES.items()},
}
_LINE_LENGTH = 100


def take_switches(arguments: list[str]) -> tuple[list[str], set[str]]:
    """Return the arguments without the switches that every stage has, and the names of the given switches."""
    flags = {f"--{name}" for name in SWITCHES}
    return [word for word in arguments if word not in flags], {word[2:] for word in arguments if word in flags}


def answer_of(arguments: list[str]) -> str | None:
    """Return help or version if the arguments ask for it, and None if they name a stage to run."""
    words, _ = take_switches(arguments)
    if words[:1] == ["--version"]:
        return f"isoprune {__version__}\n"
    return describe_stages() if words[:1] in (["-h"], ["--help"]) else None


def describe_stages() -> str:
    """Return the help: stages by heading, options, examples and exit codes."""
    parts = [f"usage: {USAGE}\n\n{TEXT}"]
    for title, members in HEADINGS.items():
        parts.append(_section(title, {name: (GROUPS.get(name) or STAGES[name]).text for name in members}))
    parts.append(_section("options", _OPTIONS))
    parts.append(f"examples:\n{_EXAMPLES}")
    parts.append(_section("exit codes", {str(code): text for code, text in EXIT_CODES.items()}))
    return "\n\n".join(parts) + "\n"


def _section(title: str, texts: dict[str, str]) -> str:
    indent = " " * (6 + max(map(len, texts)))
    lines = []
    for name, text in texts.items():
        first = f"    {name}".ljust(len(indent))
        lines += textwrap.wrap(text, _LINE_LENGTH, initial_indent=first, subsequent_indent=indent)
    return "\n".join([f"{title}:", *lines])
