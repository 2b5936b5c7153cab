"""The stages that look at models and plans, and the replay of a plan: nothing here scores, decides or trains."""

from dataclasses import fields
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from isoprune_hf.checkpoint.folder import check_output, read_json, replace_file
from isoprune_hf.checkpoint.modeling_isoprune import IsoPruneForImageClassification
from isoprune_hf.checkpoint.stock import our_values
from isoprune_hf.checkpoint.structure import meta_copy
from isoprune_hf.errors import CheckpointError, IsoPruneError, RecipeError
from isoprune_hf.models import load_base
from isoprune_hf.pruning.doctor import Finding, check_model, check_replay
from isoprune_hf.pruning.graph import trace_groups
from isoprune_hf.pruning.plan import PLAN_FILE, PruningPlan
from isoprune_hf.pruning.replay import replay_plan
from isoprune_hf.publishing.plan_text import diff_plans, show_plan
from isoprune_hf.publishing.report import draw_classes
from isoprune_hf.recipes import DataRecipe, PruneRecipe, recipe_to_dict
from isoprune_hf.results import summarize, write_folder
from isoprune_hf.sources import open_base, open_data, open_source


def run_inspect(model: str, output: str | None) -> str:
    """List the isomorphic classes of a model; draw them when there is a place for the picture."""
    opened = load_base(model, pretrained=Path(model).is_dir()).model
    decided = PruningPlan.load(model) if (Path(model) / PLAN_FILE).is_file() else None
    if opened.config.layout == "uniform":
        decided = None  # its plan speaks of groups of the base, and a stock config does not lead back to them
    # The plan speaks of the groups of the dense base.
    groups = trace_groups(opened if decided is None else meta_copy(opened, dense=True))
    classes: dict[str, list[Any]] = {}
    for group in groups:
        classes.setdefault(group.signature, []).append(group)
    lines = [f"{model}: {len(groups)} coupled groups in {len(classes)} isomorphic classes"]
    for number, (signature, members) in enumerate(classes.items(), 1):
        channels = sum(group.channels for group in members)
        kept = channels if decided is None else sum(len(decided.kept.get(g.name, range(g.channels))) for g in members)
        shape = signature if len(signature) < 60 else signature[:57] + "..."
        lines.append(
            f"  {number:2}  {len(members):3} groups  {channels:6} channels  {kept / channels:4.0%} kept  {shape}"
        )
    if output is not None:
        title = Path(model).name if decided is None else f"{Path(model).name}: what the plan keeps"
        replace_file(output, lambda temporary: draw_classes(groups, decided, temporary, title=title))
        lines.append(f"picture: {output}")
    return "\n".join(lines)


def run_plan_show(plan: str) -> str:
    """Show what a plan keeps; in the folder of a model, of how many."""
    decided = PruningPlan.load(plan)
    return show_plan(decided, title=plan, sizes=_sizes(Path(plan), decided))


def run_plan_diff(first: str, second: str) -> tuple[str, int]:
    """Show in what two plans differ; returns 1 beside the text where they do."""
    text = diff_plans(PruningPlan.load(first), PruningPlan.load(second), (first, second))
    return (text, 1) if text else ("the plans are equal", 0)


def run_plan_apply(
    accelerator: Accelerator,
    prune: PruneRecipe,
    data: DataRecipe,
    plan: str,
    model: str | None,
    output: str,
    overwrite: bool,
    ignore_fingerprint: bool,
) -> str:
    """Replay a plan on its base and write the folder of the pruned model."""
    folder = check_output(output, overwrite=overwrite)
    decided = PruningPlan.load(plan)
    settings = recipe_to_dict(prune)
    if model is not None:
        settings["model"] = model
    images = open_data(data, accelerator) if data.dataset else None
    base = open_base(PruneRecipe(**settings), data, images, accelerator, is_scored=True)
    pruned, replayed = replay_plan(base.model, decided, ignore_fingerprint=ignore_fingerprint)
    known = {field.name for field in fields(PruneRecipe)} - {"model", "pretrained", "model_args", "num_labels", "seed"}
    settings |= {key: value for key, value in decided.settings.items() if key in known}
    pruned.config.recipe = {**(pruned.config.recipe or {}), "prune": settings}
    if images is not None:
        pruned.config.recipe["data"] = recipe_to_dict(data)
    write_folder(folder, pruned, base.processor, accelerator, plan=replayed.to_json())
    return summarize(pruned, {}, {}, folder)


def run_doctor(folder: str, base: str | None) -> tuple[str, int]:
    """Check a folder; returns 1 beside the text where a check has failed."""
    if our_values(read_json(folder, "config.json") or {}) is None:
        raise RecipeError(f"--folder {folder} is no folder of a pruned model: it needs a config.json of isoprune")
    findings = _examine(folder, base)
    count = sum(finding.verdict == "FAIL" for finding in findings)
    indent = "\n" + " " * 17
    lines = [f"{finding.verdict:4}  {finding.check:9}  {finding.text}" for finding in findings]
    lines = [line.replace("\n", indent) for line in lines]
    return "\n".join([*lines, f"{folder}: {count or 'no'} check{'' if count == 1 else 's'} failed"]), int(count > 0)


def _examine(folder: str, base: str | None) -> list[Finding]:
    try:
        opened = load_base(folder)
    except (IsoPruneError, OSError) as error:
        return [Finding("load", "FAIL", f"{' '.join(str(error).split())}; nothing else can be checked")]
    model, plan, findings = opened.model, None, []
    findings.append(Finding("load", "ok", f"{len(model.model.state_dict())} tensors, stage {model.config.stage}"))
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
        verdict = "skip" if base is None else "FAIL"
        return [*findings, Finding("tensors", verdict, " ".join(str(error).split()))]
    return [*findings, check_replay(model, dense.model, plan)]


def _sizes(place: Path, plan: PruningPlan) -> dict[str, tuple[int, int]]:
    """Channels and heads of the base's groups; none where the plan stands alone or is of a model cut before."""
    if not (place / "config.json").is_file():
        return {}
    try:
        model: IsoPruneForImageClassification = load_base(str(place)).model
        is_its_base = (model.config.source or {}).get("fingerprint") == plan.fingerprint
        if not is_its_base or model.config.layout == "uniform":
            return {}
        return {group.name: (group.channels, group.num_heads) for group in trace_groups(meta_copy(model, dense=True))}
    except (IsoPruneError, OSError):
        return {}  # a plan can be read where the model cannot
