"""Check the folder of a pruned model: `examine_folder` for a report, `require_sound` before it is published."""

from pathlib import Path

from isoprune_hf.checkpoint.task_forms import TASK_FORMS
from isoprune_hf.commands.steps.sources import open_source
from isoprune_hf.errors import CheckpointError, IsoPruneError
from isoprune_hf.models import load_base
from isoprune_hf.pruning.doctor import Finding, check_model, check_replay
from isoprune_hf.pruning.plan import PLAN_FILE, PruningPlan


def examine_folder(folder: str, base: str | None) -> list[Finding]:
    """Return what each check found.

    Args:
        folder: Folder of a pruned model.
        base: Current place of the dense base, if it has moved since the cut.

    Raises:
        IsoPruneError: `base` is given and cannot be opened.
    """
    try:
        opened = load_base(folder, tasks=TASK_FORMS)
    except (IsoPruneError, OSError) as error:
        return [Finding("load", "FAIL", f"{' '.join(str(error).split())}; nothing else can be checked")]
    model = opened.model
    findings = [Finding("load", "ok", f"{len(model.model.state_dict())} tensors, stage {model.config.stage}")]
    plan = None
    if (Path(folder) / PLAN_FILE).is_file():
        try:
            plan = PruningPlan.load(folder)
        except IsoPruneError as error:
            findings.append(Finding("plan", "FAIL", str(error)))
    findings += check_model(model, opened.processor, plan)
    if plan is None or model.config.stage != "pruned":
        reason = "there is no plan" if plan is None else "the weights were trained after the cut"
        return [*findings, Finding("tensors", "skip", reason)]
    try:
        dense = open_source(model, base)
    except (IsoPruneError, OSError) as error:
        if base is not None and not isinstance(error, CheckpointError):
            raise
        reason = " ".join(str(error).split())
        return [*findings, Finding("tensors", "skip" if base is None else "FAIL", reason)]
    return [*findings, check_replay(model, dense.model, plan)]


def require_sound(folder: Path) -> None:
    """Check that a folder opens and agrees with itself.

    Raises:
        CheckpointError: A check fails.
    """
    opened = load_base(str(folder), tasks=TASK_FORMS)
    plan = PruningPlan.load(folder) if (folder / PLAN_FILE).is_file() else None
    for finding in check_model(opened.model, opened.processor, plan):
        if finding.verdict == "FAIL":
            text = " ".join(finding.text.split())
            raise CheckpointError(f"{folder} is not pushed: {finding.check}: {text} (isoprune doctor {folder})")
