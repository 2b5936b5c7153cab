"""The stage `prune`: cut a base model to ratios or to a budget."""

from typing import TYPE_CHECKING

from isoprune_hf.commands.flags import OVERWRITE, PUSH_TO_HUB, SCORES, output_flag
from isoprune_hf.commands.stage import Answer, Heading, Stage
from isoprune_hf.recipes import DataRecipe, PruneRecipe

if TYPE_CHECKING:
    from accelerate import Accelerator


def run(
    *,
    accelerator: "Accelerator",
    prune: PruneRecipe,
    data: DataRecipe,
    output: str,
    overwrite: bool,
    scores: str | None,
    push_to_hub: str | None,
) -> Answer:
    """Cut the base and write the folder of the pruned model."""
    from isoprune_hf.checkpoint.target import open_target
    from isoprune_hf.commands.steps.cutting import cut_and_evaluate
    from isoprune_hf.commands.steps.holding_out import settle_holdout
    from isoprune_hf.commands.steps.opening import forget_scoring, open_data, open_inputs
    from isoprune_hf.commands.steps.recording import Records
    from isoprune_hf.commands.steps.results import figures_of_cut, send_result, summarize, write_folder
    from isoprune_hf.commands.steps.settling import settle
    from isoprune_hf.hub.uploads import open_uploads

    with open_target(output, overwrite=overwrite, is_writer=accelerator.is_main_process) as target:
        target.check_inputs({"prune.model": prune.model, "prune.weights": prune.weights, "--scores": scores})
        target.check_inputs({"data.dataset": data.dataset})
        uploads = open_uploads(push_to_hub, accelerator)
        data = settle_holdout(data, prune.model)
        images = open_data(data, accelerator) if data.dataset else None
        prune, known, reader = settle(prune, images, scores)
        opened = open_inputs(prune, data, images, accelerator, reader=reader, scores=known)
        result, metrics = cut_and_evaluate(opened, output)
        found = figures_of_cut(result.plan, opened.base.model.config)
        latency = {name: figures["latency_ms"] for name, figures in found.items() if "latency_ms" in figures}
        speed = {**result.plan.settings["latency"], "milliseconds": latency} if latency else None
        write_folder(
            target,
            result.model,
            opened.base.processor,
            accelerator,
            Records(result.plan.to_json(), speed, metrics),
        )
        forget_scoring(output, accelerator)
        before = found.get("before") if latency else None
        answer = summarize(result.model, metrics, latency, target.path, notes=result.plan.notes, before=before)
        return send_result(uploads, target.path, answer)


STAGE = Stage(
    name="prune",
    run=run,
    text="Cut a base model to ratios or to a budget and write the folder OUTPUT.",
    heading=Heading.SHRINK,
    order=3,
    positional=("prune.model",),
    examples=(
        "isoprune prune timm/resnet50.a1_in1k --target-macs 50% --data DIR --output pruned",
        "isoprune prune facebook/deit-small-patch16-224 --target-latency 70% --data hf:ILSVRC/imagenet-1k",
    ),
    sections=("prune", "data"),
    flags=(output_flag("output/pruned"), OVERWRITE, SCORES, PUSH_TO_HUB),
)
