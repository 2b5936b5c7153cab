"""Read the parts of a model's folder that the folder of its training keeps; see `read_carried`."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from isoprune_hf.checkpoint.folder import read_json
from isoprune_hf.errors import CheckpointError
from isoprune_hf.pruning.plan import PLAN_FILE, PruningPlan


@dataclass(frozen=True)
class Carried:
    """Parts that a training keeps.

    Attributes:
        plan: The plan of the cut as JSON.
        speed: The measured times.
        metrics: The results of evaluations, by stage.
    """

    plan: str | None = None
    speed: dict[str, Any] | None = None
    metrics: dict[str, dict[str, float | int]] = field(default_factory=dict)


def read_carried(source: str) -> Carried:
    """Read the plan, the times and the figures of a folder; all are empty for a name that is not a folder.

    Raises:
        CheckpointError: One of the files has another content; the message names it.
    """
    plan = Path(source) / PLAN_FILE
    if plan.is_file():
        PruningPlan.load(plan)
    speed = read_json(source, "speed.json")
    return Carried(
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
