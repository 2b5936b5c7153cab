"""The stages that look at models and plans, and the replay of a plan: nothing here cuts anew or trains."""

from dataclasses import fields, replace
from pathlib import Path

from accelerate import Accelerator

from isoprune_hf.checkpoint.fingerprint import fingerprint
from isoprune_hf.checkpoint.folder import check_output, read_json, replace_file, write_file
from isoprune_hf.checkpoint.modeling_isoprune import IsoPruneForImageClassification
from isoprune_hf.checkpoint.stock import isoprune_fields
from isoprune_hf.checkpoint.structure import meta_copy
from isoprune_hf.commands.opening import open_base, open_calibration, open_data, open_scores, open_source
from isoprune_hf.commands.results import Answer, summarize, write_folder
from isoprune_hf.errors import CheckpointError, IsoPruneError, RecipeError
from isoprune_hf.models import load_base
from isoprune_hf.pruning.cost.macs import cost_model
from isoprune_hf.pruning.cutting.replay import replay_plan
from isoprune_hf.pruning.deciding.alternatives import (
    DEFAULT_BUDGET,
    check_comparable,
    make_alternatives,
    recipe_of_budget,
)
from isoprune_hf.pruning.deciding.budget import check_budget
from isoprune_hf.pruning.doctor import Finding, check_model, check_replay
from isoprune_hf.pruning.graph.blocks import find_blocks
from isoprune_hf.pruning.graph.find_groups import trace_groups
from isoprune_hf.pruning.plan import PLAN_FILE, PruningPlan
from isoprune_hf.pruning.score import score_model
from isoprune_hf.recipes import Budget, DataRecipe, PruneRecipe, recipe_to_dict
from isoprune_hf.reporting.inspection_page import Inspected, build_page, show_inspected
from isoprune_hf.reporting.pictures import check_plotting, draw_classes
from isoprune_hf.reporting.plan_text import diff_plans, show_plan

OWN = "plan"  # what the plan in a folder is called among the alternatives


def run_inspect(
    accelerator: Accelerator,
    prune: PruneRecipe,
    data: DataRecipe,
    model: str | None,
    scores: str | None,
    output: str | None,
    html: str | None,
    overwrite: bool,
) -> Answer:
    """List the isomorphic classes of a model; where scores can be had, with what the alternatives would cut."""
    for flag, file in (("--output", output), ("--html", html)):
        if file is not None:
            check_output(file, overwrite=overwrite, is_file=True, flag=flag)
            check_plotting()
    check_comparable(prune)
    prune = replace(prune, model=model or prune.model)
    if prune.model is None:
        raise RecipeError("inspect needs a model: give its name or folder, or a recipe that has prune.model")
    is_scored = scores is not None or prune.reads_images != "criterion" or data.dataset is not None
    inspected = _compare(accelerator, prune, data, scores) if is_scored else _list(prune)
    lines = [show_inspected(inspected)]
    if not is_scored:
        lines.append(
            f"no scores, so nothing is compared: criterion {prune.criterion} needs --data.dataset; or take scores "
            "from the weights with --prune.criterion l1, or from a file with --scores"
        )
    if accelerator.is_main_process:
        if output is not None:
            plan = inspected.plans.get(OWN)
            title = Path(prune.model).name if plan is None else f"{Path(prune.model).name}: what the plan keeps"
            replace_file(output, lambda temporary: draw_classes(inspected.groups, plan, temporary, title=title))
            lines.append(f"picture: {output}")
        if html is not None:
            write_file(html, build_page(inspected))
            lines.append(f"page: {html}")
    return Answer("\n\n".join(lines), inspected.to_dict())


def _list(prune: PruneRecipe) -> Inspected:
    """Inspect what can be known without weights."""
    is_folder = Path(prune.model).is_dir()
    opened = load_base(prune.model, pretrained=is_folder, model_args=prune.model_args).model
    decided = _find_plan(prune.model)
    # The plan speaks of the groups of the dense base.
    traced = opened if decided is None else meta_copy(opened, dense=True)
    plans = {} if decided is None else {OWN: decided}
    return Inspected(prune.model, trace_groups(traced, prune.signature, prune.engine), plans)


def _compare(accelerator: Accelerator, prune: PruneRecipe, data: DataRecipe, scores: str | None) -> Inspected:
    """Trace and score once, and decide by every alternative at the same MACs."""
    prune, scored = open_scores(prune, scores)
    images = open_data(data, accelerator) if data.dataset else None
    decided = _find_plan(prune.model)
    opening = prune if decided is None else _recipe_of_source(prune)
    base = open_base(opening, data, images, accelerator, is_scored=scored is not None, is_replayed=scored is not None)
    weights = fingerprint(base.model.model)
    if decided is not None and decided.fingerprint != weights:
        raise CheckpointError(f"the plan in {prune.model} was made on other weights than those of {opening.model}")
    groups = trace_groups(base.model, prune.signature, prune.engine)
    blocks = find_blocks(base.model) if prune.remove_blocks is not None else ()
    cost = cost_model(base.model, groups, blocks)
    own = {} if decided is None else decided.achieved.get("pruned", {})
    recipe = recipe_of_budget(prune, prune.target_macs or own.get("macs") or DEFAULT_BUDGET)
    check_budget(groups, recipe, cost, None, blocks)
    if scored is not None:
        if scored.fingerprint != weights:
            raise RecipeError(f"the scores in {scores} were made from other weights than those of {opening.model}")
    else:
        batches, sample = open_calibration(prune, data, images, base.processor, accelerator)
        scored = score_model(base.model, prune, batches, accelerator, sample=sample)
    plans = {} if decided is None else {OWN: decided}
    plans |= make_alternatives(groups, scored, recipe, cost=cost, blocks=blocks)
    target = (recipe.budget or Budget.parse(DEFAULT_BUDGET, "macs")).resolve(cost.base.macs)
    budget = f"At {target / 1e9:.4g} GMACs, {target / cost.base.macs:.1%} of the base"
    return Inspected(prune.model, groups, plans, scored, cost.base, budget)


def _find_plan(model: str) -> PruningPlan | None:
    """The plan of a folder; that of a uniform one speaks of groups that its stock config does not lead back to."""
    if not (Path(model) / PLAN_FILE).is_file() or load_base(model).model.config.layout == "uniform":
        return None
    return PruningPlan.load(model)


def _recipe_of_source(prune: PruneRecipe) -> PruneRecipe:
    """Open the dense base that a folder was cut from, and not the folder."""
    source = load_base(prune.model).model.config.source or {}
    if not source.get("name"):
        raise RecipeError(f"{prune.model} has a plan, and names no base that it was cut from: nothing can be scored")
    options = ("pretrained", "seed", "model_args", "num_labels")
    return replace(prune, model=source["name"], **{key: source[key] for key in options if key in source})


def run_plan_show(plan: str) -> str:
    """Show what a plan keeps; in the folder of a model, of how many."""
    decided = PruningPlan.load(plan)
    return show_plan(decided, title=plan, sizes=_sizes(Path(plan), decided))


def run_plan_diff(first: str, second: str) -> Answer:
    """Show in what two plans differ; returns 1 beside the text where they do."""
    text = diff_plans(PruningPlan.load(first), PruningPlan.load(second), (first, second))
    return Answer(text or "the plans are equal", code=int(bool(text)))


def run_plan_apply(
    accelerator: Accelerator,
    prune: PruneRecipe,
    data: DataRecipe,
    plan: str,
    model: str | None,
    output: str,
    overwrite: bool,
    ignore_fingerprint: bool,
) -> Answer:
    """Replay a plan on its base and write the folder of the pruned model."""
    folder = check_output(output, overwrite=overwrite)
    decided = PruningPlan.load(plan)
    settings = recipe_to_dict(prune)
    if model is not None:
        settings["model"] = model
    images = open_data(data, accelerator) if data.dataset else None
    base = open_base(PruneRecipe(**settings), data, images, accelerator, is_scored=True, is_replayed=True)
    pruned, replayed = replay_plan(base.model, decided, ignore_fingerprint=ignore_fingerprint)
    known = {field.name for field in fields(PruneRecipe)} - {"model", "pretrained", "model_args", "num_labels", "seed"}
    settings |= {key: value for key, value in decided.settings.items() if key in known}
    pruned.config.recipe = {**(pruned.config.recipe or {}), "prune": settings}
    if images is not None:
        pruned.config.recipe["data"] = recipe_to_dict(data)
    write_folder(folder, pruned, base.processor, accelerator, plan=replayed.to_json())
    return summarize(pruned, {}, {}, folder)


def run_doctor(folder: str, base: str | None) -> Answer:
    """Check a folder; returns 1 beside the text where a check has failed."""
    if isoprune_fields(read_json(folder, "config.json") or {}) is None:
        raise RecipeError(f"--folder {folder} is no folder of a pruned model: it needs a config.json of isoprune")
    findings = _examine(folder, base)
    count = sum(finding.verdict == "FAIL" for finding in findings)
    indent = "\n" + " " * 17
    lines = [f"{finding.verdict:4}  {finding.check:9}  {finding.text}" for finding in findings]
    lines = [line.replace("\n", indent) for line in lines]
    text = "\n".join([*lines, f"{folder}: {count or 'no'} check{'' if count == 1 else 's'} failed"])
    figures = {"folder": folder, "failed": count, "findings": [finding._asdict() for finding in findings]}
    return Answer(text, figures, int(count > 0))


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
