"""The stage `finetune`: train a pruned model, with a teacher if there is one."""

from pathlib import Path
from typing import TYPE_CHECKING, Literal

from isoprune_hf.commands.flags import MODEL, OVERWRITE, PUSH_EVERY, PUSH_TO_HUB, output_flag
from isoprune_hf.commands.stage import Answer, Flag, Heading, Stage
from isoprune_hf.errors import RecipeError
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
    from accelerate.logging import get_logger

    from isoprune_hf.checkpoint.folder import check_output, read_json
    from isoprune_hf.commands.steps.opening import evaluate_on, open_data, with_data_transform
    from isoprune_hf.commands.steps.results import send_result, summarize, write_trained
    from isoprune_hf.commands.steps.sources import check_classes, open_teacher, open_with_new_head, reopen_base
    from isoprune_hf.commands.steps.training import CHECKPOINTS, Checkpoints, open_run, train_student
    from isoprune_hf.hub.uploads import open_uploads
    from isoprune_hf.models import load_base
    from isoprune_hf.training.run import is_begun, read_run

    known = read_run(Path(output) / CHECKPOINTS)
    was_finished = known is not None and known["finished"]
    has_run = is_begun(Path(output) / CHECKPOINTS)
    folder = check_output(output, overwrite=overwrite, holds_run=has_run)
    if Path(model).resolve() == folder.resolve():
        raise RecipeError("--output must be another folder than --model")
    uploads = open_uploads(push_to_hub, accelerator, push_every)
    images = open_data(data, accelerator)
    found = load_base(model) if num_labels is None else open_with_new_head(model, images.label_names, finetune.seed)
    student = with_data_transform(found, data)
    check_classes(images.label_names, student.model)
    # Figures measured with another transform or head than that of the new folder are not comparable.
    is_same = student is found and num_labels is None
    metrics = dict(read_json(model, "metrics.json") or {}) if is_same else {}
    has_dense = num_labels is None  # the dense model has other classes than a new head
    teacher = open_teacher(student.model, finetune) if has_dense or finetune.teacher != "auto" else None
    training = open_run(folder, student, images, data, finetune, teacher, accelerator, overwrite=overwrite)
    if training.is_finished and not overwrite and (folder / "config.json").is_file():
        get_logger(__name__).info(
            f"--output {output} contains the result of this run; retrain it with --overwrite true"
        )
        answer = summarize(load_base(output).model, read_json(output, "metrics.json") or {}, {}, folder)
        return send_result(uploads, folder, answer)
    check_output(output, overwrite=overwrite, holds_run=has_run and not was_finished)
    if has_dense and images.evaluation is not None and "base" not in metrics:
        dense = (teacher if finetune.teacher == "auto" else None) or reopen_base(student.model)
        if dense is not None:
            metrics["base"] = evaluate_on(images, dense.model, student.processor, data, accelerator)
    checkpoints = Checkpoints(folder / CHECKPOINTS, training, uploads)
    with training:
        metrics |= train_student(
            student, images, data, finetune, accelerator, teacher=teacher, checkpoints=checkpoints, metrics=metrics
        )
        write_trained(folder, student, accelerator, source=model, metrics=metrics, keep=CHECKPOINTS)
        training.finish()
    return send_result(uploads, folder, summarize(student.model, metrics, {}, folder))


STAGE = Stage(
    name="finetune",
    run=run,
    text="Train the pruned model in the folder MODEL and write the folder OUTPUT.",
    heading=Heading.SHRINK,
    order=4,
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
