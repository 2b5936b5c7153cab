"""The stage `doctor`: check that the parts of a pruned model's folder agree."""

import sys

from isoprune_hf.commands.flags import MOVED_BASE, PRUNED_FOLDER
from isoprune_hf.commands.stage import Answer, Heading, Stage
from isoprune_hf.errors import RecipeError
from isoprune_hf.terminal import Look, paint

_LOOKS: dict[str, Look] = {"ok": "green", "FAIL": "red"}
_TEXT_COLUMN = 17


def run(*, folder: str, base: str | None) -> Answer:
    """Check a folder; the exit code is 1 if a check fails."""
    from isoprune_hf.checkpoint.folder import read_json
    from isoprune_hf.checkpoint.stock import isoprune_fields
    from isoprune_hf.commands.steps.checking import examine_folder

    if isoprune_fields(read_json(folder, "config.json") or {}) is None:
        raise RecipeError(f"--folder {folder} is not the folder of a pruned model: it needs a config.json of isoprune")
    findings = examine_folder(folder, base)
    count = sum(finding.verdict == "FAIL" for finding in findings)
    lines = []
    for finding in findings:
        text = finding.text.replace("\n", "\n" + " " * _TEXT_COLUMN)
        lines.append(f"{_paint_verdict(finding.verdict)}  {finding.check:9}  {text}")
    text = "\n".join([*lines, f"{folder}: {count or 'no'} check{'' if count == 1 else 's'} failed"])
    figures = {"folder": folder, "failed": count, "findings": [finding._asdict() for finding in findings]}
    return Answer(text, figures, int(count > 0))


def _paint_verdict(verdict: str) -> str:
    column = f"{verdict:4}"
    return paint(column, _LOOKS[verdict], sys.stdout) if verdict in _LOOKS else column


STAGE = Stage(
    name="doctor",
    run=run,
    text="Check a folder: structure, plan, weights, costs; exits with 1 if a check fails.",
    heading=Heading.MEASURE,
    order=11,
    flags=(PRUNED_FOLDER, MOVED_BASE),
    positional=("folder",),
    examples=("isoprune doctor finetuned",),
    is_local=True,
)
