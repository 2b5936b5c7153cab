"""The stage `evaluate`: measure any model, and store the results in its folder if they belong there."""

from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from isoprune_hf.commands.flags import MODEL
from isoprune_hf.commands.stage import Answer, Flag, Heading, Stage
from isoprune_hf.errors import RecipeError
from isoprune_hf.recipes import DataRecipe

if TYPE_CHECKING:
    from accelerate import Accelerator

_MAX_NAME = 40  # characters of a model in the table


def run(
    *,
    accelerator: "Accelerator",
    data: DataRecipe,
    model: str,
    pretrained: bool,
    weights: str | None,
    model_args: dict[str, Any],
    num_labels: int | Literal["data"] | None,
    per_class: str | None,
) -> Answer:
    """Evaluate a model and print its size and figures."""
    from accelerate.logging import get_logger

    from isoprune_hf.checkpoint.folder import write_file
    from isoprune_hf.checkpoint.output_check import check_output
    from isoprune_hf.checkpoint.structure import is_cut
    from isoprune_hf.checkpoint.task_forms import TASK_FORMS
    from isoprune_hf.commands.steps import recording
    from isoprune_hf.commands.steps.holding_out import has_seen, settle_holdout
    from isoprune_hf.commands.steps.opening import evaluate_on, evaluation_split, open_data, with_data_transform
    from isoprune_hf.commands.steps.sources import align_images, reopen_base
    from isoprune_hf.commands.steps.timing import move
    from isoprune_hf.data.labels import require_labels
    from isoprune_hf.data.loading import LoaderOptions
    from isoprune_hf.evaluation.evaluate import compute_figures, predict_split
    from isoprune_hf.evaluation.metrics import is_per_class_table
    from isoprune_hf.models import load_base
    from isoprune_hf.models.base import require_finite_base
    from isoprune_hf.pruning.cost.macs import count_cost
    from isoprune_hf.reporting.tables import results_table, shorten
    from isoprune_hf.tasks.registry import find_task

    logger = get_logger(__name__)
    if per_class is not None:
        check_output(per_class, overwrite=True, is_file=True, flag="--per_class")
        if Path(per_class).exists() and not is_per_class_table(per_class):
            raise RecipeError(
                f"--per_class {per_class} exists and is not a table of this command; choose another file"
            )
    place = recording.open_result_folder(model)
    data = settle_holdout(data, model, otherwise=0.0)
    images = open_data(data, accelerator).evaluating_all(data.eval_images)
    evaluation_split(images, data)  # before the model is loaded
    if num_labels is not None:
        require_labels(images)
    names = images.label_names
    own = {"num_labels": len(names), "label_names": names, "problem_type": images.problem_type}
    head = own if num_labels == "data" else {"num_labels": num_labels}
    found = load_base(model, pretrained, model_args=model_args, weights=weights, tasks=TASK_FORMS, **head)
    require_finite_base(found, model)
    task = find_task(found.model.config)
    if per_class is not None and not task.reads_labels:
        raise RecipeError(f"--per_class is for a classifier, and {model} is for {task.form.task}; leave it out")
    images = align_images(images, found.model)
    split = evaluation_split(images, data)
    base = with_data_transform(found, data)
    cost = count_cost(base.model)
    logger.info(f"MACs: {cost.macs / 1e9:.4f} G, Params: {cost.params / 1e6:.4f} M")
    transform = "the model's own" if base is found else recording.describe_transform(data)
    logger.info(f"evaluate {model} on {len(split):,} images, transform: {transform}")
    if per_class is None:
        dense = None if task.reads_labels or not is_cut(base.model.config) else reopen_base(base.model)
        moved = None if dense is None else move(dense.model, accelerator.device)
        figures = evaluate_on(images, base.model, base.processor, data, accelerator, dense=moved)
    else:
        predictions = predict_split(
            move(base.model, accelerator.device),
            split,
            base.processor,
            LoaderOptions(data.batch_size, data.num_workers, images.decoding),
            accelerator=accelerator,
        )
        table = predictions.table(images.label_names)
        figures = images.with_provenance(compute_figures(predictions))
    is_seen = has_seen(base.model.config, images)
    is_stored = recording.takes_figures(place, base.model, data, has_own_transform=base is found, is_seen=is_seen)

    def store() -> None:
        if place is not None and is_stored:
            recording.record_figures(place, base.model, figures, data)
        if per_class is not None:
            write_file(Path(per_class), table)

    text = results_table({shorten(model, _MAX_NAME): {**cost.to_dict(), **figures}}, has_details=True)
    return Answer(text, {"model": model, **cost.to_dict(), **figures}, store=store)


STAGE = Stage(
    name="evaluate",
    run=run,
    text="Evaluate MODEL: MACs, parameters, and the figures of its task, such as accuracy, loss and calibration error "
    "of a classifier. The results are stored in MODEL if it is an isoprune folder.",
    heading=Heading.MEASURE,
    order=9,
    positional=("model",),
    examples=("isoprune evaluate pruned --data DIR",),
    sections=("data",),
    flags=(
        MODEL,
        Flag("pretrained", bool, True, "Load the trained weights; false draws random weights without a network."),
        Flag("weights", str | None, None, "File with the trained weights, as in prune.weights."),
        Flag("model_args", dict[str, Any], {}, 'Arguments of an untrained architecture, such as {"img_size": 64}.'),
        Flag("num_labels", int | Literal["data"] | None, None, "Size of a new, random head, as in prune.num_labels."),
        Flag(
            "per_class",
            str | None,
            None,
            "CSV file for the figures of each class; an existing one of this command is replaced.",
        ),
    ),
)
