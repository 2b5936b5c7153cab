"""Estimate the cost of a stage before it begins: `log_estimate` and `log_training` say it before a long one."""

from collections.abc import Callable, Sequence
from dataclasses import replace

from accelerate.logging import get_logger

from isoprune_hf.commands.steps.opening import Opened
from isoprune_hf.data.dataset import ImageData
from isoprune_hf.data.streaming import count_images
from isoprune_hf.measuring.speed import runtime_of
from isoprune_hf.models import BaseModel
from isoprune_hf.pruning.cost.macs import count_cost
from isoprune_hf.pruning.deciding.alternatives import recipe_of_budget
from isoprune_hf.pruning.forecast import WITH_BACKWARD, Forecast, count_bytes, forecast, time_pass
from isoprune_hf.recipes import FinetuneRecipe
from isoprune_hf.recipes.values import Precision
from isoprune_hf.reporting.plan_text import describe_forecast

logger = get_logger(__name__)

_SHORT_MACS = 1e9  # of a pass: a pruning takes about ten, in seconds on one core
_PASSES = 10
_TIMED_IMAGES = 16


def estimate_cut(opened: Opened, images: int) -> Forecast:
    """Estimate the cost of scoring, cutting, repairing and evaluating; one small batch is timed.

    Args:
        opened: Inputs of the stage.
        images: Calibration images of all ranks.
    """
    return forecast(
        opened.base.model,
        opened.prune,
        images=images,
        evaluated=_count_evaluated(opened.images),
        ranks=opened.accelerator.num_processes,
        is_scored=opened.scores is not None,
    )


def estimate_scores(opened: Opened, images: int) -> Forecast:
    """Estimate the cost of scoring alone."""
    cost = estimate_cut(opened, images)
    stages = {stage: cost.passes[stage] for stage in ("rotate", "score")}
    return replace(cost, passes=stages, products=0.0, stored_bytes=0)


def estimate_sizes(opened: Opened, images: int, shares: Sequence[float]) -> Forecast:
    """Estimate the cost of cuts of one base to several shares of its MACs, from one scoring."""
    sizes, mean = len(shares), sum(shares) / len(shares)
    cost = estimate_cut(replace(opened, prune=recipe_of_budget(opened.prune, f"{100 * mean:.10g}%")), images)
    passes = {stage: number * (1 if stage == "score" else sizes) for stage, number in cost.passes.items()}
    passes["evaluate"] -= (sizes - 1) * _count_evaluated(opened.images) / max(images, 1)  # the base is evaluated once
    return replace(cost, passes=passes, products=cost.products * sizes)


def log_estimate(opened: Opened, images: int, estimate: Callable[[Opened, int], Forecast] = estimate_cut) -> None:
    """Log the estimate of a pruning in one line, unless it takes only seconds."""
    if count_cost(opened.base.model).macs * images > _SHORT_MACS:
        logger.info(describe_forecast(estimate(opened, images)))


def log_training(
    student: BaseModel, images: ImageData, recipe: FinetuneRecipe, teacher: BaseModel | None, ranks: int
) -> None:
    """Log the estimate of a training in one line, unless it takes only seconds; one small batch is timed.

    The batch is timed in the precision and the memory format of the recipe. An update counts three forward passes of
    the student and one of a teacher whose answers are not stored.
    """
    macs, count = count_cost(student.model).macs, count_images(images, recipe)
    if recipe.steps_per_epoch is not None:
        count = min(count, recipe.steps_per_epoch * recipe.batch_size)
    if macs * count * recipe.epochs * WITH_BACKWARD <= _PASSES * _SHORT_MACS:
        return
    is_taught = teacher is not None and recipe.teacher_cache is None
    taught = count_cost(teacher.model).macs / macs if teacher is not None and is_taught else 0.0
    evaluations = 1 + recipe.epochs // recipe.evaluate_every + (recipe.epochs % recipe.evaluate_every > 0)
    passes = {
        "train": recipe.epochs * (WITH_BACKWARD + taught),
        "evaluate": evaluations * _count_evaluated(images) / count,
    }
    precision: Precision = "no" if recipe.precision == "no" else "bf16"  # fp16 takes as long
    runtime = runtime_of("channels_last" if recipe.channels_last else "eager", precision)
    batch_size = min(recipe.batch_size, _TIMED_IMAGES)
    seconds = time_pass(student.model, count / ranks, batch_size=batch_size, runtime=runtime)
    logger.info(describe_forecast(Forecast(count, passes, 0.0, seconds, count_bytes(student.model), 0, 0)))


def _count_evaluated(images: ImageData | None) -> int:
    return 0 if images is None or images.evaluation is None else len(images.evaluation)
