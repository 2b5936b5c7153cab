"""Entry point of `isoprune`: answer `--version` and `--help` from stored texts, or run `isoprune_hf.__main__.main`.

Importing isoprune_hf takes seconds, because it registers its classes with transformers. The texts are those of
`isoprune_hf.cli`; `python tests/helpers/help_texts.py` stores them, and a test compares them.
"""

import os
import sys
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

_HELP = {"-h", "--help"}
_SIGPIPE_CODE = 141  # of a shell, for a process that SIGPIPE has ended


def main() -> int:
    """Run the command line on the arguments of the process and return its exit code."""
    text = find_answer(sys.argv[1:])
    if text is None:
        from isoprune_hf.__main__ import main as run

        return run()
    try:
        sys.stdout.write(text)
        sys.stdout.flush()
    except BrokenPipeError:  # the reader of the output has ended, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return _SIGPIPE_CODE
    return 0


def find_answer(words: list[str]) -> str | None:
    """Return the version or the stored help that arguments ask for; None if they ask for anything else."""
    if words[:1] == ["--version"]:
        return f"isoprune {version('isoprune-hf')}\n"
    package = find_spec("isoprune_hf")
    if package is None or package.origin is None or not _HELP & {*words}:
        return None
    texts = Path(package.origin).parent / "cli" / "help_texts"
    named = words[: next(number for number, word in enumerate(words) if word.startswith("-"))]
    for name in ("_".join(named[:2]), *named[:1], *(["isoprune"] if words[0] in _HELP else [])):
        if name.isidentifier() and (texts / f"{name}.txt").is_file():
            return (texts / f"{name}.txt").read_text(encoding="utf-8")
    return None
