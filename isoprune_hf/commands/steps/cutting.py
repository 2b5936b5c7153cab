"""Cut the opened base of a stage; see `cut_base`."""

from dataclasses import replace

from isoprune_hf.commands.steps.estimating import log_estimate
from isoprune_hf.commands.steps.opening import Opened
from isoprune_hf.pruning.plan import record_transform
from isoprune_hf.pruning.prune import PruneResult, prune_model
from isoprune_hf.recipes import recipe_to_dict


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
