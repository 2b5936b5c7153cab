"""The stage `score`: compute importance scores of a base model and write them to a file."""

from typing import TYPE_CHECKING

from isoprune_hf.commands.flags import OVERWRITE, output_flag
from isoprune_hf.commands.stage import Answer, Heading, Stage
from isoprune_hf.recipes import DataRecipe, PruneRecipe

if TYPE_CHECKING:
    from accelerate import Accelerator


def run(*, accelerator: "Accelerator", prune: PruneRecipe, data: DataRecipe, output: str, overwrite: bool) -> Answer:
    """Score the base and write `importance.safetensors`."""
    from isoprune_hf.checkpoint.folder import replace_file
    from isoprune_hf.checkpoint.target import open_target
    from isoprune_hf.commands.steps.estimating import estimate_scores, log_estimate
    from isoprune_hf.commands.steps.holding_out import settle_holdout
    from isoprune_hf.commands.steps.opening import forget_scoring, open_data, open_inputs
    from isoprune_hf.commands.steps.settling import settle
    from isoprune_hf.pruning.score import score_model

    with open_target(output, overwrite=overwrite, is_file=True, is_writer=accelerator.is_main_process) as target:
        target.check_inputs({"prune.weights": prune.weights})
        data = settle_holdout(data, prune.model)
        images = open_data(data, accelerator) if data.dataset else None
        prune, _, reader = settle(prune, images)
        opened = open_inputs(prune, data, images, accelerator, reader=reader)
        calibration = opened.open_calibration(output)
        log_estimate(opened, calibration.sample.get("images", 0), estimate_scores)
        scores = score_model(
            opened.base.model, opened.prune, calibration.batches, accelerator, sample=calibration.sample
        )
        accelerator.wait_for_everyone()  # every rank has checked the output by now
        if accelerator.is_main_process:
            replace_file(target, scores.save)
        forget_scoring(output, accelerator)
    figures = {"file": output, "groups": len(scores.scores), "criterion": scores.criterion}
    return Answer(f"scores of {len(scores.scores)} groups are in {output}", figures)


STAGE = Stage(
    name="score",
    run=run,
    text="Score the channels of a base model and save the scores, which serve any number of cuts.",
    heading=Heading.SHRINK,
    order=2,
    positional=("prune.model",),
    examples=("isoprune score timm/resnet50.a1_in1k --data DIR --output scores.safetensors",),
    sections=("prune", "data"),
    flags=(output_flag("output/importance.safetensors"), OVERWRITE),
)
