"""Where the command line starts: `isoprune`, `python -m isoprune_hf`; without extras it says what is missing."""

import os
import sys
from collections.abc import Sequence

from isoprune_hf.cli.help import answer_of
from isoprune_hf.errors import MissingExtraError
from isoprune_hf.extras import require_package


def main(arguments: Sequence[str] | None = None) -> int:
    """Answer `--version` and `--help`, run a stage, or say which extra it needs; see `isoprune_hf.cli.main.main`."""
    answer = answer_of(list(sys.argv[1:] if arguments is None else arguments))
    if answer is not None:
        sys.stdout.write(answer)
        return 0
    try:
        require_package("isoprune_hf.cli.main", "the command line")
    except MissingExtraError as error:
        sys.stderr.write(f"isoprune: error: {error}\n")
        return 2
    from isoprune_hf.cli import main as cli

    try:
        code = cli.main(arguments)
        sys.stdout.flush()
    except BrokenPipeError:  # whoever read the output has gone, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141  # as after SIGPIPE
    return code


if __name__ == "__main__":
    sys.exit(main())
