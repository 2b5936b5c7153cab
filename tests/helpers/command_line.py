"""Run the command line in this process, and read what it printed and wrote."""

import contextlib
import io
import itertools
import json
import logging
import os
import re
from pathlib import Path
from typing import Any, NamedTuple

from isoprune_hf.cli.main import main


class Done(NamedTuple):
    """Exit code and output of a command."""

    code: int | str | None
    out: str
    err: str


def isoprune(*arguments: str | Path) -> Done:
    """Run the command line in this process, and restore the logging and the progress bars of the tests afterwards."""
    is_quiet = os.environ.get("TQDM_DISABLE", "")
    root, package = logging.getLogger(), logging.getLogger("isoprune_hf")
    handlers, levels = root.handlers, (root.level, package.level)
    root.handlers = []
    out, err = io.StringIO(), io.StringIO()
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            code = main([str(argument) for argument in arguments])
    except SystemExit as stopped:
        code = stopped.code
    finally:
        root.handlers = handlers
        root.setLevel(levels[0])
        package.setLevel(levels[1])
        os.environ["TQDM_DISABLE"] = is_quiet  # which --quiet sets
    return Done(code, out.getvalue(), err.getvalue())


def succeed(*arguments: str | Path) -> str:
    """Run a command that must succeed and leave no temporary files next to its output; return what it printed."""
    done = isoprune(*arguments)
    assert (done.code, done.err) == (0, "")
    for flag, place in itertools.pairwise(arguments):
        if flag in ("--output", "--model") and Path(place).exists():
            assert leftovers(Path(place).parent) == []
    return done.out


def refuse(*arguments: str | Path) -> str:
    """Run a command that must fail with exit code 2 and one line on standard error; return the line."""
    done = isoprune(*arguments)
    assert done.code == 2
    assert re.fullmatch(r"isoprune: error: [^\n]+\n", done.err), done.err
    assert "Traceback" not in done.out + done.err
    return done.err


def leftovers(folder: Path) -> list[Path]:
    """Return the temporary files below a folder."""
    return [path for path in folder.rglob("*") if path.suffix in (".tmp", ".old")]


def contents(folder: Path) -> dict[str, bytes | None]:
    """Return every path below a folder with its bytes; None for a folder."""
    return {str(p.relative_to(folder)): p.read_bytes() if p.is_file() else None for p in sorted(folder.rglob("*"))}


def read(folder: Path, name: str) -> dict[str, Any]:
    """Return the content of a JSON file in a folder."""
    values: dict[str, Any] = json.loads((folder / name).read_text(encoding="utf-8"))
    return values
