"""The stage `run`: all steps from the dense base to the finetuned, evaluated folder."""

from typing import TYPE_CHECKING

from isoprune_hf.commands.flags import OVERWRITE, PUSH_EVERY, PUSH_TO_HUB, output_flag
from isoprune_hf.commands.stage import Answer, Heading, Stage
from isoprune_hf.recipes import DataRecipe, FinetuneRecipe, PruneRecipe

if TYPE_CHECKING:
    from accelerate import Accelerator


def run(
    *,
    accelerator: "Accelerator",
    prune: PruneRecipe,
    data: DataRecipe,
    pretrain: FinetuneRecipe,
    finetune: FinetuneRecipe,
    output: str,
    overwrite: bool,
    push_to_hub: str | None,
    push_every: int | None,
) -> Answer:
    """Open, train the base if requested, score, cut, finetune, evaluate and write; an unfinished run is resumed."""
    from isoprune_hf.checkpoint.target import open_target
    from isoprune_hf.commands.steps.holding_out import settle_holdout
    from isoprune_hf.commands.steps.opening import evaluation_split, open_data, open_inputs
    from isoprune_hf.commands.steps.pipeline import run_pipeline
    from isoprune_hf.commands.steps.results import send_result
    from isoprune_hf.commands.steps.settling import settle
    from isoprune_hf.hub.uploads import open_uploads

    with open_target(output, overwrite=overwrite, is_writer=accelerator.is_main_process) as target:
        models = {"prune.model": prune.model, "prune.weights": prune.weights, "finetune.teacher": finetune.teacher}
        target.check_inputs({**models, "data.dataset": data.dataset})
        target.check_inputs({"finetune.teacher_cache": finetune.teacher_cache}, are_places=True)
        uploads = open_uploads(push_to_hub, accelerator, push_every)
        data = settle_holdout(data, prune.model)
        images = open_data(data, accelerator)
        evaluation_split(images, data)  # before the model is loaded
        prune, _, reader = settle(prune, images)
        opened = open_inputs(prune, data, images, accelerator, reader=reader)
        answer = run_pipeline(
            opened, opened.images or images, pretrain, finetune, target, uploads, overwrite=overwrite
        )
        return send_result(uploads, target.path / "model", answer)


STAGE = Stage(
    name="run",
    run=run,
    text="Run all steps (default): score, cut, finetune with a teacher, evaluate, and write OUTPUT/model.",
    heading=Heading.SHRINK,
    order=1,
    positional=("prune.model",),
    examples=("isoprune run timm/resnet50.a1_in1k --target-macs 50% --data DIR --output out",),
    sections=("prune", "data", "pretrain", "finetune"),
    flags=(output_flag("output/run"), OVERWRITE, PUSH_TO_HUB, PUSH_EVERY),
)
