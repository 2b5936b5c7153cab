"""The stages `plan show`, `plan diff`, `plan apply` and `plan cost`: read, compare, replay plans; foretell costs."""

import json
from typing import TYPE_CHECKING

from isoprune_hf.commands.flags import BASE_MODEL, OVERWRITE, output_flag, plan_flag
from isoprune_hf.commands.stage import Answer, Flag, Heading, Stage, StageGroup
from isoprune_hf.recipes import DataRecipe, PruneRecipe

if TYPE_CHECKING:
    from accelerate import Accelerator


def run_show(*, plan: str) -> Answer:
    """Show what a plan keeps; for a plan in a model's folder, also out of how many channels and heads."""
    from isoprune_hf.commands.steps.replaying import base_sizes
    from isoprune_hf.pruning.plan import PruningPlan
    from isoprune_hf.reporting.plan_text import show_plan

    loaded = PruningPlan.load(plan)
    return Answer(show_plan(loaded, title=plan, sizes=base_sizes(plan, loaded)), json.loads(loaded.to_json()))


def run_diff(*, first: str, second: str) -> Answer:
    """Show the differences between two plans; the exit code is 1 if there are any."""
    from isoprune_hf.pruning.plan import PruningPlan
    from isoprune_hf.reporting.plan_text import diff_plans

    plans = [PruningPlan.load(file) for file in (first, second)]
    text = diff_plans(plans[0], plans[1], (first, second))
    figures = {"equal": not text, "plans": [json.loads(plan.to_json()) for plan in plans]}
    return Answer(text or "the plans are equal", figures, code=int(bool(text)))


def run_apply(
    *,
    accelerator: "Accelerator",
    prune: PruneRecipe,
    data: DataRecipe,
    plan: str,
    model: str | None,
    output: str,
    overwrite: bool,
    ignore_fingerprint: bool,
) -> Answer:
    """Replay a plan on its base and write the folder of the pruned model."""
    from isoprune_hf.checkpoint.target import open_target
    from isoprune_hf.commands.steps.holding_out import settle_holdout
    from isoprune_hf.commands.steps.opening import open_data, open_inputs
    from isoprune_hf.commands.steps.recording import Records
    from isoprune_hf.commands.steps.replaying import replay_on_base, settle_transform
    from isoprune_hf.commands.steps.results import summarize, write_folder
    from isoprune_hf.pruning.plan import PruningPlan
    from isoprune_hf.recipes import recipe_to_dict

    with open_target(output, overwrite=overwrite, is_writer=accelerator.is_main_process) as target:
        target.check_inputs({"--plan": plan, "prune.model": model or prune.model, "data.dataset": data.dataset})
        loaded = PruningPlan.load(plan)
        settings = recipe_to_dict(prune)
        if model is not None:
            settings["model"] = model
        data = settle_transform(settle_holdout(data, settings["model"]), loaded)
        images = open_data(data, accelerator) if data.dataset else None
        opened = open_inputs(PruneRecipe(**settings), data, images, accelerator, reader=None)
        pruned, replayed = replay_on_base(opened, loaded, settings, ignore_fingerprint=ignore_fingerprint)
        write_folder(target, pruned, opened.base.processor, accelerator, Records(replayed.to_json()))
    return summarize(pruned, {}, {}, target.path)


def run_cost(*, accelerator: "Accelerator", prune: PruneRecipe, data: DataRecipe) -> Answer:
    """Estimate the cost of a pruning; a small batch is timed, and nothing is scored."""
    from dataclasses import asdict

    from isoprune_hf.commands.steps.estimating import estimate_cut
    from isoprune_hf.commands.steps.holding_out import settle_holdout
    from isoprune_hf.commands.steps.opening import open_data, open_inputs
    from isoprune_hf.commands.steps.settling import settle
    from isoprune_hf.reporting.plan_text import show_forecast

    data = settle_holdout(data, prune.model)
    images = open_data(data, accelerator) if data.dataset else None
    prune, _, reader = settle(prune, images)
    opened = open_inputs(prune, data, images, accelerator, reader=reader)
    cost = estimate_cut(opened, opened.open_calibration().sample.get("images", 0))
    figures = {**asdict(cost), "seconds": {stage: cost.seconds(stage) for stage in cost.passes}}
    return Answer(show_forecast(cost), figures)


_SHOW = Stage(
    name="plan show",
    run=run_show,
    text="Show what a plan keeps, and the settings that it was made with.",
    heading=Heading.MEASURE,
    order=8,
    flags=(plan_flag("plan"),),
    positional=("plan",),
    is_local=True,
)
_DIFF = Stage(
    name="plan diff",
    run=run_diff,
    text="Show the differences between two plans; exits with 0 if they are equal and with 1 if not.",
    heading=Heading.MEASURE,
    order=8,
    flags=(plan_flag("first"), plan_flag("second")),
    positional=("first", "second"),
    is_local=True,
)
_APPLY = Stage(
    name="plan apply",
    run=run_apply,
    text="Replay a plan on its base and write the folder OUTPUT. The section prune only opens the base (model, "
    "pretrained, model_args, num_labels, seed); the plan has decided all else, the size of the images included.",
    heading=Heading.MEASURE,
    order=8,
    sections=("prune", "data"),
    flags=(
        plan_flag("plan"),
        BASE_MODEL,
        output_flag("output/pruned"),
        OVERWRITE,
        Flag("ignore_fingerprint", bool, False, "Also cut weights that the plan was not made on."),
    ),
    positional=("plan",),
)
_COST = Stage(
    name="plan cost",
    run=run_cost,
    text="Say what `prune` with the same flags will cost, before anything is scored: passes over the images, time at "
    "the measured speed of a small batch, and memory.",
    heading=Heading.MEASURE,
    order=8,
    positional=("prune.model",),
    examples=("isoprune plan cost timm/resnet50.a1_in1k --target-macs 50% --data DIR",),
    sections=("prune", "data"),
)
STAGE = StageGroup(
    "plan",
    "Show a pruning plan, compare two, replay one on its base, or foretell what a pruning costs.",
    (_SHOW, _DIFF, _APPLY, _COST),
)
