"""The files of a model's folder beside its weights: `read_records` reads them, `record_figures` adds an evaluation."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.logging import get_logger

from isoprune_hf.checkpoint.folder import read_json, write_file
from isoprune_hf.checkpoint.modeling_isoprune import IsoPruneForImageClassification
from isoprune_hf.checkpoint.stock import isoprune_fields, stock_config_text
from isoprune_hf.errors import CheckpointError
from isoprune_hf.pruning.plan import PLAN_FILE, PruningPlan
from isoprune_hf.recipes import DataRecipe, recipe_to_dict
from isoprune_hf.reporting.model_card import build_model_card

logger = get_logger(__name__)


@dataclass(frozen=True)
class Records:
    """The files of a model's folder beside its weights.

    Attributes:
        plan: The plan of the cut as JSON.
        speed: The measured times.
        metrics: The results of evaluations, by stage.
    """

    plan: str | None = None
    speed: dict[str, Any] | None = None
    metrics: dict[str, dict[str, float | int]] = field(default_factory=dict)


def read_records(source: str) -> Records:
    """Read the plan, the times and the figures of a folder; all are empty for a name that is not a folder.

    Raises:
        CheckpointError: One of the files has another content; the message names it.
    """
    plan = Path(source) / PLAN_FILE
    if plan.is_file():
        PruningPlan.load(plan)
    speed = read_json(source, "speed.json")
    return Records(
        plan=plan.read_text(encoding="utf-8") if plan.is_file() else None,
        speed=None if speed is None else _check_speed(speed, source),
        metrics=read_metrics(source),
    )


def read_metrics(folder: str) -> dict[str, dict[str, float | int]]:
    """Read the results of evaluations of a folder, by stage; empty without the file.

    Raises:
        CheckpointError: The file has another content.
    """
    found = read_json(folder, "metrics.json") or {}
    return {name: _check_figures(entry, name, folder) for name, entry in found.items()}


def _check_figures(entry: Any, name: str, folder: str) -> dict[str, float | int]:
    if not isinstance(entry, Mapping) or not all(type(value) in (int, float) for value in entry.values()):
        raise CheckpointError(
            f"{Path(folder) / 'metrics.json'}: the entry {name!r} must map names to numbers, got {entry!r:.99}; "
            "correct or remove the file"
        )
    return dict(entry)


def _check_speed(speed: dict[str, Any], folder: str) -> dict[str, Any]:
    times = speed.get("milliseconds", {})
    if not isinstance(times, Mapping) or not all(type(value) in (int, float) for value in times.values()):
        raise CheckpointError(
            f"{Path(folder) / 'speed.json'}: milliseconds must map names to numbers, got {times!r:.99}; correct or "
            "remove the file"
        )
    return speed


def describe_transform(data: DataRecipe) -> str:
    """Return the evaluation transform of the data section as text."""
    given = {"resize": data.resize, "interpolation": data.interpolation, "mean": data.mean, "std": data.std}
    return ", ".join(f"{name} {value}" for name, value in given.items() if value is not None)


def record_figures(
    folder: str,
    model: IsoPruneForImageClassification,
    figures: dict[str, float | int],
    data: DataRecipe,
    accelerator: Accelerator,
    *,
    has_own_transform: bool,
) -> None:
    """Store figures in `metrics.json` and the card of an isoprune folder; other models are left untouched.

    Figures of another transform than the folder's own, or of another data set than the recorded one, are not
    comparable with those that are stored and are left out, with a line in the log.

    Args:
        folder: Folder or name that the model was opened by.
        model: The evaluated model; its config gets the data section if it has none yet.
        figures: Results of the evaluation.
        data: The data set that was evaluated on.
        accelerator: The ranks; the main process writes.
        has_own_transform: The images went through the model's own evaluation transform.
    """
    config = model.config
    recorded = (config.recipe or {}).get("data")
    known = read_json(folder, "config.json")
    if known is not None and isoprune_fields(known) is not None:
        if not has_own_transform or (recorded is not None and recorded["dataset"] != data.dataset):
            what = "data set" if has_own_transform else "transform"
            logger.info(f"the figures are not stored in the folder: they were measured with another {what}")
        elif accelerator.is_main_process:
            metrics = {**read_metrics(folder), config.stage: figures}
            write_file(Path(folder) / "metrics.json", json.dumps(metrics, indent=2, sort_keys=True) + "\n")
            if recorded is None:
                config.recipe = {**(config.recipe or {}), "data": recipe_to_dict(data)}
                is_stock = config.layout == "uniform"
                text = stock_config_text(known, config) if is_stock else config.to_json_string()
                write_file(Path(folder) / "config.json", text)
            write_file(Path(folder) / "README.md", str(build_model_card(folder)))
    accelerator.wait_for_everyone()
