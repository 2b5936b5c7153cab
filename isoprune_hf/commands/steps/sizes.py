"""Cut and measure several sizes of one base for the stage `frontier`.

`cut_sizes` cuts, `measure_sizes` and `record_sizes` collect the figures, `write_sizes` writes the files.
"""

import csv
import io
import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from isoprune_hf.checkpoint.folder import write_file
from isoprune_hf.checkpoint.structure import image_size_of
from isoprune_hf.commands.steps.estimating import estimate_sizes, log_estimate
from isoprune_hf.commands.steps.opening import Opened, evaluate_on
from isoprune_hf.errors import BudgetError
from isoprune_hf.measuring.speed import measure_latency, record_measurement, runtime_of
from isoprune_hf.pruning.deciding.alternatives import recipe_of_budget
from isoprune_hf.pruning.prune import PruneResult, prune_model
from isoprune_hf.pruning.scoring.scores import ImportanceScores
from isoprune_hf.recipes import recipe_to_dict
from isoprune_hf.reporting.ornaments import ornament
from isoprune_hf.reporting.pictures import draw_frontier
from isoprune_hf.reporting.tables import results_table
from isoprune_hf.tasks.task import Task

logger = logging.getLogger(__name__)
_TIMED_PASSES = 20


@dataclass(frozen=True)
class Cuts:
    """Cuts of one base.

    Attributes:
        results: Share of the base's MACs -> its cut, the smallest first.
        scores: The scores that all of them were decided from.
    """

    results: dict[float, PruneResult]
    scores: ImportanceScores


def cut_sizes(opened: Opened, shares: Sequence[float], output: str, *, may_leave_out: bool) -> Cuts:
    """Score unless scores were read, and cut to each share of the base's MACs.

    Args:
        opened: The base.
        shares: The sizes.
        output: Folder of the results, which keeps the state of the scoring.
        may_leave_out: A size that cannot be reached is left out with a line, unless none can be.

    Raises:
        BudgetError: A size cannot be reached. The smallest is tried first, and refused before the scoring.
    """
    calibration = opened.open_calibration(output)
    log_estimate(opened, calibration.sample.get("images", 0), partial(estimate_sizes, shares=shares))
    results: dict[float, PruneResult] = {}
    scores = opened.scores
    for share in sorted(shares):
        size = f"{100 * share:.10g}%"
        try:
            results[share] = prune_model(
                opened.base.model,
                recipe_of_budget(opened.prune, size),
                calibration.batches,
                opened.accelerator,
                scores=scores,
                sample=calibration.sample,
            )
        except BudgetError as error:
            if not may_leave_out or share == max(shares):
                raise
            logger.warning("the size %s is left out: %s", size, error)
            continue
        scores = results[share].scores
    return Cuts(results, results[max(shares)].scores)


def measure_sizes(opened: Opened, cuts: Cuts) -> list[dict[str, Any]]:
    """Return one row for the base and for each cut, the largest first: cost, latency and the figures of the task."""
    base, prune, data = opened.base, opened.prune, opened.data
    shares = sorted(cuts.results, reverse=True)
    models = {1.0: base.model} | {share: cuts.results[share].model for share in shares}
    costs = {1.0: cuts.results[shares[0]].base_cost} | {share: cuts.results[share].pruned_cost for share in shares}
    latency = measure_latency(
        {str(share): model for share, model in models.items()},
        image_size_of(base.model),
        batch_size=prune.latency_batch_size,
        runtime=runtime_of(prune.latency_backend, prune.latency_precision),
        repeats=_TIMED_PASSES,
    )
    rows = []
    for share, model in models.items():
        row: dict[str, Any] = {"size": share, **costs[share].to_dict(), "latency_ms": round(latency[str(share)], 4)}
        if opened.images is not None and opened.images.evaluation is not None:
            dense = None if share == 1 else base.model
            row |= evaluate_on(opened.images, model, base.processor, data, opened.accelerator, dense=dense)
        rows.append(row)
    return rows


def record_sizes(opened: Opened, cuts: Cuts, rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the rows with how they were measured and decided, as `frontier.json` stores them."""
    prune = opened.prune
    latency = record_measurement(
        opened.accelerator.device,
        runtime_of(prune.latency_backend, prune.latency_precision),
        batch_size=prune.latency_batch_size,
        repeats=_TIMED_PASSES,
    )
    return {
        "rows": rows,
        "latency": latency,
        "fingerprint": cuts.scores.fingerprint,
        "criterion": cuts.scores.criterion,
        "recipe": {"prune": recipe_to_dict(prune), "data": recipe_to_dict(opened.data)},
    }


def tabulate_sizes(rows: Sequence[dict[str, Any]]) -> str:
    """Return the sizes as a table with the measured columns."""
    return results_table({f"{100 * row['size']:.10g}%": row for row in rows}, title="size", has_details=True)


def write_sizes(
    folder: Path, rows: list[dict[str, Any]], record: dict[str, Any], scores: ImportanceScores, task: Task
) -> None:
    """Write table, record, plots and scores of a task into a folder."""
    table = io.StringIO()
    names = ("size", "macs", "params", "latency_ms", *task.figures, "images", "broken")
    columns = [key for key in names if any(key in row for row in rows)]
    writer = csv.DictWriter(table, columns, lineterminator="\n", extrasaction="ignore")
    writer.writeheader()
    writer.writerows(rows)
    write_file(folder / "frontier.csv", table.getvalue())
    write_file(folder / "frontier.json", json.dumps(record, indent=2, sort_keys=True) + "\n")
    scores.save(folder / "importance.safetensors")
    with ornament("the plot of the sizes"):
        draw_frontier(rows, [folder / "frontier.svg", folder / "frontier.png"], best=task.figures[0])
