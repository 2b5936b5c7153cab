"""Tiny cuts of one base for the tests of stages that read folders."""

import json
import re
import shutil
from pathlib import Path

from helpers.command_line import contents, refuse, succeed

MODEL_ARGS = {"img_size": 16, "patch_size": 4, "embed_dim": 32, "depth": 2, "num_heads": 4}
NAME = "timm/vit_tiny_patch16_224"
OPEN = ["--prune.pretrained", "false", "--prune.model_args", json.dumps(MODEL_ARGS), "--prune.num_labels", "10"]
CUT = ["--prune.model", NAME, *OPEN, "--prune.criterion", "l1", "--prune.head_ratio", "0.25", "--prune.round_to", "4"]


def write_cuts(root: Path) -> Path:
    """Write two cuts of one base, `small` and `large`, and one of another base, `other`; return `root`."""
    succeed("prune", *CUT, "--output", root / "small")
    succeed("prune", *CUT, "--prune.target_macs", "60%", "--output", root / "large")
    succeed("prune", *CUT, "--prune.seed", "7", "--output", root / "other")
    return root


def check_refused(arguments: list[str], words: list[str], folders: Path, tmp_path: Path) -> None:
    """Check that a command is refused in one line that has all words, and that it changes no file.

    `@tmp`, `@root` and `@small` stand for `tmp_path`, `folders` and a cut in it; `@mixed` for a cut with another plan.
    """
    for name, place in {"@tmp": tmp_path, "@root": folders, "@small": folders / "small"}.items():
        arguments = [argument.replace(name, str(place)) for argument in arguments]
    if "@mixed" in arguments:
        mixed = shutil.copytree(folders / "small", tmp_path / "mixed")
        shutil.copy(folders / "other" / "pruning_plan.json", mixed)
        arguments = [argument.replace("@mixed", str(mixed)) for argument in arguments]
    before, scratch = contents(folders), contents(tmp_path)
    line = refuse(*arguments)
    assert [word for word in words if not re.search(word, line)] == [], line
    assert contents(tmp_path) == scratch and contents(folders) == before
