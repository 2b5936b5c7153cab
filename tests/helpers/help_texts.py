"""The texts of `isoprune --help` and `isoprune STAGE --help`: `python tests/helpers/help_texts.py` stores them."""

import contextlib
import io
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "isoprune_hf" / "cli" / "help_texts"


def make_texts() -> dict[str, str]:
    """Return the text of each file: `isoprune` for the whole help, and one for each stage and group of stages."""
    from isoprune_hf.cli.help import describe_stages
    from isoprune_hf.cli.main import main
    from isoprune_hf.cli.table import GROUPS, STAGES

    texts = {"isoprune": describe_stages()}
    for name in (*STAGES, *GROUPS):
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed), contextlib.suppress(SystemExit):
            main([*name.split(), "--help"])
        texts[name.replace(" ", "_")] = printed.getvalue()
    return texts


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    FOLDER.mkdir(exist_ok=True)
    for file, text in make_texts().items():
        (FOLDER / f"{file}.txt").write_text(text, encoding="utf-8")
