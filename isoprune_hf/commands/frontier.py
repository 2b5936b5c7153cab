"""The stage that shows what each size would cost: several cuts from one scoring, measured side by side."""

import csv
import io
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from isoprune_hf.checkpoint.folder import check_output, replace_folder, write_file
from isoprune_hf.commands.opening import forget_scoring, open_base, open_calibration, open_data, open_scores
from isoprune_hf.commands.results import Answer
from isoprune_hf.errors import RecipeError
from isoprune_hf.evaluation.evaluate import evaluate_model
from isoprune_hf.measuring.speed import measure_latency, record_measurement
from isoprune_hf.pruning.deciding.alternatives import recipe_of_budget
from isoprune_hf.pruning.prune import PruneResult, prune_model
from isoprune_hf.pruning.scoring.scores import ImportanceScores
from isoprune_hf.recipes import DataRecipe, PruneRecipe, recipe_to_dict
from isoprune_hf.reporting.pictures import check_plotting, draw_frontier
from isoprune_hf.reporting.tables import format_figure

COLUMNS = {
    "size": "size",
    "macs": "GMACs",
    "params": "params (M)",
    "latency_ms": "latency (ms)",
    "top1": "top-1 %",
    "top5": "top-5 %",
    "loss": "loss",
    "ece": "calibration error",
    "images": "images",
    "broken": "broken",
}
_REPEATS = 20


def run_frontier(
    accelerator: Accelerator,
    prune: PruneRecipe,
    data: DataRecipe,
    model: str | None,
    sizes: str,
    scores: str | None,
    output: str,
    overwrite: bool,
) -> Answer:
    """Score once, cut to every size, measure all of them, and write table, plot and scores."""
    shares = read_sizes(sizes)
    folder = check_output(output, overwrite=overwrite, marks=("frontier.json",))
    check_plotting()
    if prune.steps > 1:
        raise RecipeError(f"frontier cuts every size from one scoring: set prune.steps to 1, not {prune.steps}")
    prune = replace(prune, model=model or prune.model, target_macs=None, target_params=None, target_latency=None)
    prune, known = open_scores(prune, scores)
    images = open_data(data, accelerator) if data.dataset else None
    base = open_base(prune, data, images, accelerator, is_scored=known is not None)
    options = {"is_scored": known is not None, "output": output}
    batches, sample = open_calibration(prune, data, images, base.processor, accelerator, **options)
    results: dict[float, PruneResult] = {}
    for share in sorted(shares):  # the smallest first: one that cannot be reached is refused before the scoring
        recipe = recipe_of_budget(prune, f"{100 * share:.10g}%")
        results[share] = prune_model(base.model, recipe, batches, accelerator, scores=known, sample=sample)
        known = results[share].scores
    models = {1.0: base.model} | {share: results[share].model for share in sorted(shares, reverse=True)}
    costs = {1.0: results[shares[0]].base_cost} | {share: result.pruned_cost for share, result in results.items()}
    measured = {
        "batch_size": prune.latency_batch_size,
        "precision": prune.latency_precision,
        "backend": prune.latency_backend,
        "repeats": _REPEATS,
    }
    named = {str(share): cut for share, cut in models.items()}
    latency = measure_latency(named, base.model.config.image_size, **measured)
    rows = []
    for share, cut in models.items():
        row = {"size": share, **costs[share].to_dict(), "latency_ms": round(latency[str(share)], 4)}
        if images is not None and images.evaluation is not None:
            options = {"batch_size": data.batch_size, "num_workers": data.num_workers, "accelerator": accelerator}
            row |= evaluate_model(cut.to(accelerator.device), images.evaluation, base.processor, **options)
        rows.append(row)
    record = {
        "rows": rows,
        "latency": record_measurement(accelerator.device, **measured),
        "fingerprint": known.fingerprint,
        "criterion": known.criterion,
        "recipe": {"prune": recipe_to_dict(prune), "data": recipe_to_dict(data)},
    }
    if accelerator.is_main_process:
        replace_folder(folder, lambda place: _write(place, rows, record, known))
    forget_scoring(output, accelerator)
    accelerator.wait_for_everyone()
    again = f"isoprune prune --prune.model {prune.model} --scores {folder / 'importance.safetensors'}"
    again += f" --prune.preset {preset}" if (preset := prune.taken_preset) else f" --prune.criterion {prune.criterion}"
    again += f" --data.dataset {data.dataset}" if prune.data_step else ""
    text = (
        f"{tabulate_frontier(rows)}\n\nThe table, its plot and the scores are in {folder}. Make a folder of a size "
        f"with:\n\n    {again} --prune.target_macs 50%"
    )
    return Answer(text, {"folder": str(folder), **record})


def read_sizes(text: str) -> tuple[float, ...]:
    """Read shares of the base as people write them: 0.8,0.5.

    Raises:
        RecipeError: One is no number between 0 and 1, or stands there twice.
    """
    shares = []
    for part in text.split(","):
        try:
            share = float(part)
        except ValueError:
            share = float("nan")
        if not 0 < share < 1:
            raise RecipeError(f"--sizes must be numbers between 0 and 1, as 0.8,0.5,0.3, got {part.strip()!r}")
        if share in shares:
            raise RecipeError(f"--sizes names {share:g} twice")
        shares.append(share)
    return tuple(shares)


def tabulate_frontier(rows: list[dict[str, Any]]) -> str:
    """Write the sizes as a table of Markdown, with the columns that were measured."""
    keys = [key for key in COLUMNS if any(key in row for row in rows)]
    lines = [[COLUMNS[key] for key in keys]]
    lines += [["---:" for _ in keys]]
    for row in rows:
        lines.append([f"{row[key]:g}" if key == "size" else format_figure(key, row.get(key)) for key in keys])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _write(folder: Path, rows: list[dict[str, Any]], record: dict[str, Any], scores: ImportanceScores) -> None:
    table = io.StringIO()
    writer = csv.DictWriter(table, [key for key in COLUMNS if key in rows[0]], lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_file(folder / "frontier.csv", table.getvalue())
    write_file(folder / "frontier.json", json.dumps(record, indent=2, sort_keys=True) + "\n")
    draw_frontier(rows, [folder / "frontier.svg", folder / "frontier.png"])
    scores.save(folder / "importance.safetensors")
