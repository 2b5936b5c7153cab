"""The stage `finetune`: train a pruned model, with a teacher if there is one."""

from pathlib import Path
from typing import TYPE_CHECKING, Literal

from isoprune_hf.commands.flags import MODEL, OVERWRITE, PUSH_EVERY, PUSH_TO_HUB, output_flag
from isoprune_hf.commands.stage import Answer, Flag, Heading, Stage
from isoprune_hf.recipes import DataRecipe, FinetuneRecipe

if TYPE_CHECKING:
    from accelerate import Accelerator


def run(
    *,
    accelerator: "Accelerator",
    model: str,
    num_labels: Literal["data"] | None,
    data: DataRecipe,
    finetune: FinetuneRecipe,
    output: str,
    overwrite: bool,
    push_to_hub: str | None,
    push_every: int | None,
) -> Answer:
    """Train a pruned model and write the result to another folder; an unfinished run of that folder is resumed."""
    from isoprune_hf.checkpoint.target import CHECKPOINTS, open_target
    from isoprune_hf.commands.steps.finetuning import Source, finetune_folder
    from isoprune_hf.commands.steps.results import send_result
    from isoprune_hf.hub.uploads import open_uploads
    from isoprune_hf.training.run import is_begun

    has_run = is_begun(Path(output) / CHECKPOINTS)
    is_writer = accelerator.is_main_process
    with open_target(output, overwrite=overwrite, is_writer=is_writer, keep=CHECKPOINTS, holds_run=has_run) as target:
        target.check_inputs({"--model": model, "finetune.teacher": finetune.teacher, "data.dataset": data.dataset})
        target.check_inputs({"finetune.teacher_cache": finetune.teacher_cache}, are_places=True)
        uploads = open_uploads(push_to_hub, accelerator, push_every)
        source = Source(model, takes_new_head=num_labels is not None)
        answer = finetune_folder(source, target, data, finetune, accelerator, uploads, overwrite=overwrite)
        return send_result(uploads, target.path, answer)


STAGE = Stage(
    name="finetune",
    run=run,
    text="Train the pruned model in the folder MODEL and write the folder OUTPUT.",
    heading=Heading.SHRINK,
    order=4,
    positional=("model",),
    examples=("isoprune finetune pruned --data DIR --output finetuned",),
    sections=("data", "finetune"),
    flags=(
        MODEL,
        Flag(
            "num_labels", Literal["data"] | None, None, "data replaces the head by a new one for the data's classes."
        ),
        output_flag("output/finetuned"),
        OVERWRITE,
        PUSH_TO_HUB,
        PUSH_EVERY,
    ),
)
