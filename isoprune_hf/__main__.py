"""Where the command line starts: `isoprune`, `python -m isoprune_hf`; it can say what is missing to go on."""

import sys
from collections.abc import Sequence

from isoprune_hf.errors import MissingExtraError
from isoprune_hf.extras import require_package


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line, or say which extra it needs; see `isoprune_hf.cli.main`."""
    try:
        require_package("isoprune_hf.cli", "the command line")
    except MissingExtraError as error:
        sys.stderr.write(f"isoprune: error: {error}\n")
        return 2
    from isoprune_hf import cli

    return cli.main(arguments)


if __name__ == "__main__":
    sys.exit(main())
