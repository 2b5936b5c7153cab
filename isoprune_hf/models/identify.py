"""Determine where a base model comes from: `identify`."""

import json
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from transformers import PreTrainedConfig

from isoprune_hf.errors import RecipeError
from isoprune_hf.models.base import unreadable

Library = Literal["timm", "torchvision", "transformers", "isoprune"]
Kind = Literal["architecture", "folder", "hub"]


@dataclass(frozen=True)
class BaseSource:
    """Origin of a base model.

    Args:
        name: The name that the user gave, without spaces around it.
        library: Library that wrote the config or has the architecture.
        kind: An architecture name of timm or torchvision, a local folder, or a Hub id.
        place: Name of the architecture, with its tag of weights if given; path of the folder; or Hub id.
        config: Content of config.json; empty for an architecture name.
    """

    name: str
    library: Library
    kind: Kind
    place: str
    config: dict[str, Any]


def identify(name: str | Path) -> BaseSource:
    """Determine library, kind and place of a base model; reads its config.json, but no weights.

    Args:
        name: `timm/NAME` or a bare timm name, `torchvision/NAME`, a Hub id, or a local folder.

    Raises:
        RecipeError: The name has none of these forms, or its config cannot be read.
    """
    text = str(name).strip() if isinstance(name, str | Path) else ""
    if not text or not text.isprintable():
        raise RecipeError(
            f"model: {name!r:.99} is not a model name; use timm/NAME, torchvision/NAME, a Hub id or a folder"
        )
    kind = _kind(text)
    if kind == "architecture":
        library, _, place = text.rpartition("/")
        return BaseSource(text, "torchvision" if library == "torchvision" else "timm", kind, place, {})
    place = os.path.expanduser(text) if kind == "folder" else text
    config = _folder_config(Path(place)) if kind == "folder" else _hub_config(place)
    return BaseSource(text, _library(config), kind, place, config)


def _kind(name: str) -> Kind:
    path = os.path.expanduser(name)
    if os.path.isdir(path):
        return "folder"
    if os.path.isfile(path):
        raise RecipeError(
            f"model: {name} is a file; to convert an old checkpoint to a folder, run `isoprune convert {name}`"
        )
    if name.startswith(("/", ".", "~")) or name.count("/") > 1:
        raise RecipeError(f"model: the folder {name!r:.99} does not exist")
    if "/" not in name or name.startswith(("timm/", "torchvision/")):
        return "architecture"
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", name, re.ASCII):
        raise RecipeError(f"model: {name!r:.99} is neither a folder nor a Hub id of the form owner/name")
    return "hub"


def _library(config: dict[str, Any]) -> Library:
    kind = config.get("model_type", "timm_wrapper" if "architecture" in config else None)
    if kind == "isoprune":
        return "isoprune"
    return "timm" if kind == "timm_wrapper" else "transformers"


def _folder_config(folder: Path) -> dict[str, Any]:
    try:
        config: object = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, RecursionError, ValueError) as error:
        raise RecipeError(f"model: {folder} contains no readable config.json") from error
    if not isinstance(config, dict):
        raise RecipeError(f"model: {folder}/config.json must contain a JSON object")
    return config


def _hub_config(name: str) -> dict[str, Any]:
    try:
        return PreTrainedConfig.get_config_dict(name)[0]
    except (OSError, RecursionError, TypeError, ValueError) as error:  # not found, or not a JSON object
        raise unreadable(name, error) from error
