"""Estimate the cost of a pruning before it begins: `estimate_cut`, and `log_estimate` before a long one."""

from accelerate.logging import get_logger

from isoprune_hf.commands.steps.opening import Opened
from isoprune_hf.pruning.cost.macs import count_cost
from isoprune_hf.pruning.forecast import Forecast, forecast
from isoprune_hf.reporting.plan_text import describe_forecast

logger = get_logger(__name__)

_SHORT_MACS = 1e9  # of a pass: a pruning takes about ten, in seconds on one core


def estimate_cut(opened: Opened, images: int) -> Forecast:
    """Estimate the cost of scoring, cutting, repairing and evaluating; one small batch is timed.

    Args:
        opened: Inputs of the stage.
        images: Calibration images of all ranks.
    """
    data = opened.images
    return forecast(
        opened.base.model,
        opened.prune,
        images=images,
        evaluated=0 if data is None or data.evaluation is None else len(data.evaluation),
        ranks=opened.accelerator.num_processes,
        is_scored=opened.scores is not None,
    )


def log_estimate(opened: Opened, images: int) -> None:
    """Log the estimate of a pruning in one line, unless it takes only seconds."""
    if count_cost(opened.base.model).macs * images > _SHORT_MACS:
        logger.info(describe_forecast(estimate_cut(opened, images)))
