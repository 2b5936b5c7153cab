"""Spearman's rank correlation: `correlate_ranks` of two arrays, `correlate_precisions` of scores in bf16 and fp32."""

import logging
import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch

from isoprune_hf.pruning.calibration.calibration import Batch, Calibration
from isoprune_hf.pruning.calibration.gradients import sum_over_ranks
from isoprune_hf.pruning.scoring.criteria.criterion import Criterion, ScoringTask
from isoprune_hf.recipes.values import Precision

logger = logging.getLogger(__name__)


def correlate_precisions(criterion: Criterion, task: ScoringTask, first: Sequence[Batch]) -> float | None:
    """Compare the ranks that bf16 and fp32 give the channels on the first micro-batch of rank 0; equal on all ranks.

    Args:
        criterion: A criterion that reads images.
        task: Its task.
        first: The first micro-batch of rank 0; not used on other ranks.

    Returns:
        Mean over groups of Spearman's rank correlation; None if no group has two different scores.
    """
    accelerator = task.calibration.accelerator
    total = torch.zeros(2, dtype=torch.float64, device=task.model.device)
    if accelerator is None or accelerator.process_index == 0:

        def scores_in(precision: Precision) -> dict[str, torch.Tensor]:
            calibration = Calibration(first, precision=precision)
            return criterion.score(replace(task, calibration=calibration, blocks=())).groups

        half = scores_in("bf16")
        full = scores_in("no")
        found = [correlate_ranks(half[name].cpu().numpy(), full[name].cpu().numpy()) for name in half]
        found = [value for value in found if not math.isnan(value)]
        total += torch.tensor([sum(found), len(found)], dtype=torch.float64)
    value, count = sum_over_ranks(total, accelerator).tolist()
    if accelerator is None or accelerator.is_main_process:
        logger.info(
            "bf16 ranks the channels as fp32 does with a mean rank correlation of %.4f over %d groups (%d images)",
            value / max(count, 1),
            count,
            sum(len(labels) for _, labels in first),
        )
    return float(value / count) if count else None


def correlate_ranks(first: np.ndarray, second: np.ndarray) -> float:
    """Return Spearman's rank correlation of two (n,) arrays; ties share their mean rank; nan if one is constant."""
    first, second = (_rank(values) - (len(values) + 1) / 2 for values in (first, second))
    length = math.sqrt((first @ first) * (second @ second))
    return float(first @ second) / length if length else math.nan


def _rank(values: np.ndarray) -> np.ndarray:
    """Return the ranks of (n,) values, from 1; equal values have the mean of their ranks."""
    _, places, counts = np.unique(values, return_inverse=True, return_counts=True)
    ranks: np.ndarray = (np.cumsum(counts) - (counts - 1) / 2)[places]
    return ranks
