"""Entry point of `isoprune` and `python -m isoprune_hf`; see `main`."""

import io
import os
import sys
from collections.abc import Sequence

from isoprune_hf.cli.help import answer_of
from isoprune_hf.errors import Cancelled, MissingExtraError
from isoprune_hf.extras import require_package

_SIGPIPE_CODE = 141  # of a shell, for a process that SIGPIPE has ended


def main(arguments: Sequence[str] | None = None) -> int:
    """Answer `--version` and `--help`, or run a stage; see `isoprune_hf.cli.main.main`.

    A light installation answers the first two; for a stage it names the extra that is missing and returns 2.
    Characters that the encoding of the terminal lacks are printed as escapes.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    answer = answer_of(list(sys.argv[1:] if arguments is None else arguments))
    if answer is not None:
        sys.stdout.write(answer)
        return 0
    try:
        require_package("isoprune_hf.cli.main", "the command line")
    except MissingExtraError as error:
        sys.stderr.write(f"isoprune: error: {error}\n")
        return 2
    except KeyboardInterrupt:  # importing torch and transformers takes seconds
        return Cancelled.exit_code
    from isoprune_hf.cli import main as cli  # needs the extra [prune]

    try:
        code = cli.main(arguments)
        sys.stdout.flush()
    except BrokenPipeError:  # the reader of the output has ended, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return _SIGPIPE_CODE
    return code


if __name__ == "__main__":
    sys.exit(main())
