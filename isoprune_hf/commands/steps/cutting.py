"""Cut the opened base of a stage, and measure the result against the dense base: `cut_and_evaluate`."""

from dataclasses import replace

from accelerate.logging import get_logger

from isoprune_hf.checkpoint.modeling_isoprune import IsoPruneForImageClassification
from isoprune_hf.checkpoint.structure import is_cut
from isoprune_hf.commands.steps.estimating import log_estimate
from isoprune_hf.commands.steps.opening import Opened, evaluate_on
from isoprune_hf.commands.steps.sources import reopen_base
from isoprune_hf.commands.steps.timing import move
from isoprune_hf.pruning.plan import record_transform
from isoprune_hf.pruning.prune import PruneResult, prune_model
from isoprune_hf.recipes import recipe_to_dict
from isoprune_hf.reporting.tables import Metrics
from isoprune_hf.training.log import describe_figures

logger = get_logger(__name__)


def cut_base(opened: Opened, output: str) -> PruneResult:
    """Score unless scores were read, decide, cut and repair.

    Args:
        opened: Inputs of the stage.
        output: Result of the stage; an interrupted scoring resumes from the state kept next to it.

    Returns:
        The cut model, whose config also records the data section if images were used.
    """
    calibration = opened.open_calibration(output)
    log_estimate(opened, calibration.sample.get("images", 0))
    result = prune_model(
        opened.base.model,
        opened.prune,
        calibration.batches,
        opened.accelerator,
        scores=opened.scores,
        sample=calibration.sample,
    )
    if opened.images is not None:
        result.model.config.recipe = {**(result.model.config.recipe or {}), "data": recipe_to_dict(opened.data)}
    return replace(result, plan=record_transform(result.plan, opened.data.transform))


def cut_and_evaluate(opened: Opened, output: str) -> tuple[PruneResult, Metrics]:
    """Evaluate the dense base, cut, and evaluate the cut model; without images for evaluation only cut.

    The base is the first, so that an image, a mask or a box that cannot be read ends the stage before the long work.

    Of a model that was cut before, the row `base` is its dense base, whose costs stand in the same row; it is left out
    if it cannot be opened. The figures before this cut are logged.

    Args:
        opened: Inputs of the stage.
        output: As of `cut_base`.
    """
    images, (given, processor) = opened.images, opened.base
    if images is None or images.evaluation is None:
        return cut_base(opened, output), {}
    dense: IsoPruneForImageClassification | None = given
    if is_cut(given.config):
        found = reopen_base(given)
        dense = None if found is None else move(found.model, opened.accelerator.device)
        before = evaluate_on(images, given, processor, opened.data, opened.accelerator, dense=dense or given)
        numbers = {name: value for name, value in before.items() if not isinstance(value, str)}
        logger.info(f"the model before this cut: {describe_figures(numbers)}")
    metrics: Metrics = {}
    if dense is not None:
        metrics["base"] = evaluate_on(images, dense, processor, opened.data, opened.accelerator)
    result = cut_base(opened, output)
    target = dense or given
    metrics["pruned"] = evaluate_on(images, result.model, processor, opened.data, opened.accelerator, dense=target)
    return result, metrics
