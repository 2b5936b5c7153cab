"""Turn a module of timm into a base model; shared by its openers."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from timm.data.config import resolve_data_config
from timm.data.imagenet_info import ImageNetInfo, infer_imagenet_subset
from timm.models import get_pretrained_cfg
from torch import nn
from transformers import BaseImageProcessor

from isoprune_hf.checkpoint.dense import LIBRARY_ERRORS
from isoprune_hf.checkpoint.folder import read_json
from isoprune_hf.checkpoint.modeling_isoprune import IsoPruneConfig
from isoprune_hf.checkpoint.plain_values import check_args
from isoprune_hf.checkpoint.task_forms import IMAGE_CLASSIFICATION, IMAGE_FEATURE_EXTRACTION, task_entry
from isoprune_hf.errors import CheckpointError, IsoPruneError, RecipeError
from isoprune_hf.models.base import BaseModel, default_labels, label_fields, single_line, unreadable, wrap_module
from isoprune_hf.models.processors import timm_processor
from isoprune_hf.models.saved_processor import saved_processor

_MIN_CROP_SHARE = 1e-3  # far below every crop_pct of timm


@dataclass(frozen=True)
class TimmModule:
    """A module of timm and all that its config needs.

    Args:
        module: The module.
        architecture: Name of the architecture.
        model_args: Arguments of the architecture.
        data: Data config of timm: input size, crop, interpolation, mean and std.
        labels: Label names.
    """

    module: nn.Module
    architecture: str
    model_args: dict[str, Any]
    data: dict[str, Any]
    labels: Sequence[str]


def processor_of_folder(folder: Path, base: BaseModel) -> BaseImageProcessor | None:
    """Return the image processor that a folder of trained weights records for a base; None if it records none.

    Args:
        folder: Folder with a preprocessor_config.json, or a config.json of timm with `pretrained_cfg`.
        base: The base that the weights belong to.

    Raises:
        RecipeError, CheckpointError: The file is damaged.
    """
    if (folder / "preprocessor_config.json").is_file():
        return saved_processor(str(folder))
    noted = (read_json(folder, "config.json") or {}).get("pretrained_cfg")
    if not isinstance(noted, dict):
        return None
    with reading(str(folder)):
        data = resolve_data_config(pretrained_cfg=noted)  # type: ignore[no-untyped-call]  # untyped in timm
    args = (base.model.config.base or {}).get("args") or {}
    return timm_processor(_at_size_of(args, _checked_data(str(folder), data)))


def wrap_timm(opened: TimmModule) -> BaseModel:
    classes = opened.module.num_classes
    if classes and len(opened.labels) != classes:
        raise RecipeError(f"model: {opened.architecture} has {len(opened.labels)} label_names for {classes} classes")
    data = _at_size_of(opened.model_args, _checked_data(opened.architecture, opened.data))
    config = IsoPruneConfig(
        base={
            "library": "timm",
            "architecture": opened.architecture,
            "args": {**_noted_channels(opened.architecture, data), **without_classes(opened.model_args)},
            **task_entry(IMAGE_CLASSIFICATION if classes else IMAGE_FEATURE_EXTRACTION),
        },
        image_size=list(data["input_size"]),
        **(label_fields(opened.labels) if classes else {}),
    )
    return BaseModel(wrap_module(config, opened.module), timm_processor(data))


@contextmanager
def reading(place: str) -> Iterator[None]:
    """Raise a RecipeError for the errors of timm and transformers on damaged files or unusable config values."""
    try:
        yield
    except IsoPruneError:
        raise
    except (OSError, SafetensorError) as error:
        raise unreadable(place, error) from error
    except LIBRARY_ERRORS as error:
        raise RecipeError(f"model: {place} is not a usable folder of timm: {single_line(error)}") from error


def checked_args(model_args: dict[str, Any]) -> dict[str, Any]:
    try:
        return check_args(model_args)
    except CheckpointError as error:
        raise RecipeError(f"prune.model or prune.model_args: {error}") from error


def without_classes(model_args: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in model_args.items() if key != "num_classes"}


def timm_labels(module: Any) -> list[str]:
    names = module.pretrained_cfg.get("label_names")
    if names:
        return list(names)
    subset = infer_imagenet_subset(module)
    if subset is None or module.num_classes != 1000:
        return list(default_labels(module.num_classes))
    return list(_imagenet_names(subset))


@cache
def _imagenet_names(subset: str) -> tuple[str, ...]:
    """Return the names of the classes; timm reads those of all 22,000 for each `ImageNetInfo`."""
    return tuple(ImageNetInfo(subset).label_descriptions())


def _checked_data(architecture: str, data: dict[str, Any]) -> dict[str, Any]:
    """Return the data config if its values can be computed with."""
    size = data["input_size"]
    allowed = {
        "input_size": isinstance(size, list | tuple) and len(size) == 3 and all(type(side) is int for side in size),
        "crop_pct": isinstance(data["crop_pct"], int | float) and data["crop_pct"] >= _MIN_CROP_SHARE,
        "crop_mode": isinstance(data["crop_mode"], str),
        "interpolation": isinstance(data["interpolation"], str),
        "mean": isinstance(data["mean"], list | tuple),
        "std": isinstance(data["std"], list | tuple),
    }
    for name, holds in allowed.items():
        if not holds:
            raise RecipeError(f"model: {architecture}: {name} in pretrained_cfg is not usable: {data[name]!r:.99}")
    return data


def _at_size_of(model_args: dict[str, Any], data: dict[str, Any]) -> dict[str, Any]:
    """Return the data config for the channels and the image size in the arguments of the architecture."""
    side = model_args.get("img_size") or data["input_size"][-1]
    size = tuple(side) if isinstance(side, list | tuple) else (side, side)
    channels = model_args.get("in_chans") or data["input_size"][0]
    sized = {**data, "input_size": (channels, *size)}
    if size == tuple(data["input_size"][1:]):
        return sized
    # At a size that the weights were not trained at, the whole image is used, without a border.
    mode = "squash" if data["crop_mode"] == "border" else data["crop_mode"]
    return {**sized, "crop_pct": 1.0, "crop_mode": mode}


def _noted_channels(architecture: str, data: dict[str, Any]) -> dict[str, Any]:
    """Return the argument `in_chans` of a saved model if its pretrained_cfg notes other channels than timm's."""
    known, channels = get_pretrained_cfg(architecture), data["input_size"][0]
    return {} if known is None or known.input_size[0] == channels else {"in_chans": channels}
