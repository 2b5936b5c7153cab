"""The files of a model's folder beside its weights: `read_records` reads them, `record_figures` adds to them."""

import json
import logging
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from isoprune_hf.checkpoint.folder import read_json, replace_file, update_folder, write_file
from isoprune_hf.checkpoint.modeling_isoprune import IsoPruneForImageClassification
from isoprune_hf.checkpoint.stock import isoprune_fields, stock_config_text
from isoprune_hf.checkpoint.target import CHECKPOINTS, locked_target
from isoprune_hf.errors import CheckpointError, OccupiedError
from isoprune_hf.pruning.plan import PLAN_FILE, PruningPlan
from isoprune_hf.recipes import DataRecipe, recipe_to_dict
from isoprune_hf.reporting.model_card import build_model_card
from isoprune_hf.reporting.ornaments import ornament
from isoprune_hf.reporting.speed_picture import SPEED_PICTURE, draw_times
from isoprune_hf.reporting.tables import Metrics
from isoprune_hf.reporting.widths import can_draw

logger = logging.getLogger(__name__)

_WAIT_SECONDS = 30.0  # for another command that stores figures in the same folder


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
    metrics: Metrics = field(default_factory=dict)


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


def read_metrics(folder: str) -> Metrics:
    """Read the results of evaluations of a folder, by stage; empty without the file.

    Raises:
        CheckpointError: The file has another content.
    """
    found = read_json(folder, "metrics.json") or {}
    return {name: _check_figures(entry, name, folder) for name, entry in found.items()}


def _check_figures(entry: Any, name: str, folder: str) -> dict[str, float | int | str]:
    if not isinstance(entry, Mapping) or not all(map(_is_figure, entry, entry.values())):
        raise CheckpointError(
            f"{Path(folder) / 'metrics.json'}: the entry {name!r} must map names to numbers, got {entry!r:.99}; "
            "correct or remove the file"
        )
    return dict(entry)


def _is_figure(name: str, value: Any) -> bool:
    return type(value) in ((str,) if name in ("data", "split") else (int, float))


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
    return ", ".join(f"{name} {value}" for name, value in data.transform.items())


@dataclass(frozen=True)
class ResultFolder:
    """The folder of a model that figures are added to after the work.

    Attributes:
        path: The folder.
        config: Content of its config.json.
        weights: Number and time of its file of weights, by which a folder that was replaced meanwhile is recognised.
    """

    path: Path
    config: dict[str, Any]
    weights: tuple[int, int]


def open_result_folder(folder: str) -> ResultFolder | None:
    """Read the folder of an isoprune model before the work; None for all other models.

    Raises:
        CheckpointError: A file that the figures are added to has another content.
    """
    config = read_json(folder, "config.json")
    if config is None or isoprune_fields(config) is None:
        return None
    read_records(folder)
    return ResultFolder(Path(folder), config, _identify_weights(Path(folder)))


def takes_figures(
    folder: ResultFolder | None,
    model: IsoPruneForImageClassification,
    data: DataRecipe,
    *,
    has_own_transform: bool,
    is_seen: bool = False,
) -> bool:
    """Return whether figures are stored in a folder, and log a line if not.

    Figures of another transform than the folder's own, or of another data set than the recorded one, are not
    comparable with those that are stored. Without a folder nothing is stored.

    Args:
        folder: The folder of the model.
        model: The evaluated model.
        data: The data set that was evaluated on.
        has_own_transform: The images went through the model's own evaluation transform.
        is_seen: The model was pruned or trained on some of the images.
    """
    if folder is None:
        return False
    recorded = (model.config.recipe or {}).get("data")
    reason = None
    if not has_own_transform:
        reason = "they were measured with another transform"
    elif recorded is not None and recorded.get("dataset") != data.dataset:
        reason = "they were measured with another data set"
    elif is_seen:
        reason = "the model has seen some of the images"
    elif not os.access(folder.path, os.W_OK):
        reason = "it is not writable"
    if reason is not None:
        logger.info(f"the figures are not stored in the folder: {reason}")
    return reason is None


def record_figures(
    folder: ResultFolder,
    model: IsoPruneForImageClassification,
    figures: dict[str, float | int | str],
    data: DataRecipe,
) -> None:
    """Store figures in `metrics.json` and the card of a folder.

    Args:
        folder: The folder of the model.
        model: The evaluated model; its config gets the data section if it has none yet.
        figures: Results of the evaluation.
        data: The data set that was evaluated on.
    """
    config = model.config
    recorded = (config.recipe or {}).get("data")

    def write(place: Path) -> None:
        _write_json(place / "metrics.json", {**read_metrics(str(place)), config.stage: figures})
        if recorded is None:
            section = {name: value for name, value in recipe_to_dict(data).items() if name != "holdout"}
            config.recipe = {**(config.recipe or {}), "data": section}  # nothing was held out of a training
            is_stock = config.layout == "uniform"
            text = stock_config_text(folder.config, config) if is_stock else config.to_json_string()
            write_file(place / "config.json", text)

    _update(folder, write)


def record_benchmark(folder: ResultFolder, record: dict[str, Any]) -> None:
    """Store the figures of a benchmark in `speed.json`, their picture and the card of a folder."""
    title = folder.path.resolve().name

    def write(place: Path) -> None:
        known = read_json(place, "speed.json") or {}
        _write_json(place / "speed.json", {**known, "benchmark": record})
        if can_draw() and record["rows"]:
            with ornament("the picture of the times", then="the figures are stored"):
                replace_file(place / SPEED_PICTURE, partial(draw_times, record, title=title))

    _update(folder, write)


def _update(folder: ResultFolder, write: Callable[[Path], None]) -> None:
    """Change files of a folder and its card in one step; a folder that cannot be changed is one warning."""

    def write_with_card(place: Path) -> None:
        write(place)
        with ornament("the model card", then="the figures are stored"):
            write_file(place / "README.md", str(build_model_card(place, repo=folder.path.resolve().name)))

    try:
        with locked_target(folder.path, keep=CHECKPOINTS, wait=_WAIT_SECONDS) as target:
            if _identify_weights(folder.path) != folder.weights:
                raise CheckpointError(f"{folder.path} has other weights by now")
            update_folder(target, write_with_card)
    except (CheckpointError, OccupiedError) as error:
        logger.warning(f"the figures are not stored: {error}")


def _identify_weights(folder: Path) -> tuple[int, int]:
    names = sorted(folder.glob("model*.safetensors"))
    status = names[0].stat() if names else folder.stat()
    return status.st_ino, status.st_mtime_ns


def _write_json(path: Path, values: Mapping[str, Any]) -> None:
    write_file(path, json.dumps(values, indent=2, sort_keys=True) + "\n")
