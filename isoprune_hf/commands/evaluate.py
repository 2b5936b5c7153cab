"""The stage that evaluates: any model, with its size, and what a folder keeps of it."""

import json
from pathlib import Path
from typing import Any, Literal

from accelerate import Accelerator
from accelerate.logging import get_logger

from isoprune_hf.checkpoint.folder import check_output, read_json, write_file
from isoprune_hf.checkpoint.stock import isoprune_fields, stock_config_text
from isoprune_hf.commands.opening import open_data, see_through
from isoprune_hf.commands.results import Answer
from isoprune_hf.data.labels import check_labels
from isoprune_hf.data.loading import LoaderOptions
from isoprune_hf.errors import DatasetError
from isoprune_hf.evaluation.evaluate import compute_figures, predict_split, tabulate_classes
from isoprune_hf.models import load_base
from isoprune_hf.pruning.cost.macs import count_cost
from isoprune_hf.recipes import DataRecipe, recipe_to_dict
from isoprune_hf.reporting.model_card import build_model_card

logger = get_logger(__name__)


def run_evaluate(
    accelerator: Accelerator,
    model: str,
    data: DataRecipe,
    pretrained: bool,
    model_args: dict[str, Any],
    num_labels: int | Literal["data"] | None,
    per_class: str | None,
) -> Answer:
    """Evaluate a model; a local folder of ours also keeps the figures, if they are those of its own pixels.

    `per_class` names a file for the figures of each class.
    """
    if per_class is not None:
        check_output(per_class, overwrite=True, is_file=True, flag="--per_class")
    images = open_data(data, accelerator)
    if images.evaluation is None:
        raise DatasetError(f"data: {images.name} has no split {data.eval_split!r} to evaluate on; set data.eval_split")
    names = images.label_names
    labels = {"num_labels": len(names), "label_names": names} if num_labels == "data" else {"num_labels": num_labels}
    found = load_base(model, pretrained, model_args=model_args, **labels)
    check_labels(names, found.model.config.id2label)
    base = see_through(found, data)
    cost, config = count_cost(base.model), base.model.config
    logger.info(f"MACs: {cost.macs / 1e9:.4f} G, Params: {cost.params / 1e6:.4f} M")
    asked = {"resize": data.resize, "interpolation": data.interpolation}
    transform = ", ".join(f"{name} {value}" for name, value in asked.items() if value is not None)
    transform = transform if base is not found else "the model's own"
    logger.info(f"evaluate {model} on {len(images.evaluation)} images, transform: {transform}")
    predictions = predict_split(
        base.model.to(accelerator.device),
        images.evaluation,
        base.processor,
        LoaderOptions(data.batch_size, data.num_workers, images.decoding),
        accelerator=accelerator,
    )
    figures = compute_figures(predictions)
    if per_class is not None and accelerator.is_main_process:
        write_file(Path(per_class), tabulate_classes(predictions, names))
    recorded = (config.recipe or {}).get("data")
    known = read_json(model, "config.json")
    is_ours = known is not None and isoprune_fields(known) is not None
    is_comparable = base is found and (recorded is None or recorded["dataset"] == data.dataset)
    if is_ours and not is_comparable:
        what = "transform" if base is not found else "data set"
        logger.info(f"the folder does not keep these figures: they are not those of its own {what}")
    if is_ours and is_comparable and accelerator.is_main_process:
        metrics = {**(read_json(model, "metrics.json") or {}), config.stage: figures}
        write_file(Path(model) / "metrics.json", json.dumps(metrics, indent=2, sort_keys=True) + "\n")
        if recorded is None:
            config.recipe = {**(config.recipe or {}), "data": recipe_to_dict(data)}
            is_stock = config.layout == "uniform"
            text = stock_config_text(known, config) if is_stock else config.to_json_string()
            write_file(Path(model) / "config.json", text)
        write_file(Path(model) / "README.md", str(build_model_card(model)))
    accelerator.wait_for_everyone()
    line = f"Accuracy: {figures['top1']:.4f}, Loss: {figures['loss']:.4f}"
    found_figures = {"model": model, **cost.to_dict(), **figures}
    return Answer(f"{line}\n{json.dumps(figures, sort_keys=True)}", found_figures)
