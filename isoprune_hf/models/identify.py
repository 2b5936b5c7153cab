"""Determine where a base model comes from: `identify`."""

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from transformers import PreTrainedConfig
from transformers.utils.hub import cached_file, extract_commit_hash

from isoprune_hf.errors import RecipeError
from isoprune_hf.models.base import unreadable
from isoprune_hf.plain_files import is_nested_too_deeply, read_json

Library = Literal["timm", "torchvision", "transformers", "isoprune"]
Kind = Literal["architecture", "folder", "hub"]
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+", re.ASCII)
_HUB_PREFIXES = ("hf-hub:", "hf_hub:")
_PREFIXES = re.compile("(hf[-_]hub|local-dir):")  # of timm; a folder of this name would need ./ before it


@dataclass(frozen=True)
class BaseSource:
    """Origin of a base model.

    Args:
        name: The name that the user gave, without spaces around it.
        library: Library that wrote the config or has the architecture.
        kind: An architecture name of timm or torchvision, a local folder, or a Hub id.
        place: Name of the architecture, with its tag of weights if given; path of the folder; or Hub id.
        config: Content of config.json; empty for an architecture name.
        revision: Commit of a Hub repository, from which all of its files are read, or the revision of the weights of a
            timm architecture; None for other kinds.
    """

    name: str
    library: Library
    kind: Kind
    place: str
    config: dict[str, Any]
    revision: str | None = None


def identify(name: str | Path, revision: str | None = None) -> BaseSource:
    """Determine library, kind and place of a base model; reads its config.json, but no weights.

    Args:
        name: `timm/NAME` or a bare timm name, `torchvision/NAME`, a Hub id, or a local folder; `hf-hub:` before an
            id and `local-dir:` before a folder, as in timm, are allowed.
        revision: Commit, branch or tag of a Hub repository; the newest commit by default.

    Raises:
        RecipeError: The name has none of these forms, or its config cannot be read.
    """
    text = str(name).strip() if isinstance(name, str | Path) else ""
    if not text or not text.isprintable():
        raise RecipeError(
            f"model: {name!r:.99} is not a model name; use timm/NAME, torchvision/NAME, a Hub id or a folder"
        )
    is_on_hub = text.startswith(_HUB_PREFIXES)
    plain = _PREFIXES.sub("", text)
    kind: Kind = "hub" if is_on_hub and _HUB_ID.fullmatch(plain) else _kind(plain)
    if kind == "architecture":
        library, _, place = plain.rpartition("/")
        is_timm = library != "torchvision"
        return BaseSource(text, "timm" if is_timm else "torchvision", kind, place, {}, revision if is_timm else None)
    if kind == "folder":
        place = os.path.expanduser(plain)
        config = _folder_config(Path(place))
        return BaseSource(text, _library(config), kind, place, config)
    config = _hub_config(plain, revision)
    return BaseSource(text, _library(config), kind, plain, config, _commit(plain, revision))


def _kind(name: str) -> Kind:
    path = os.path.expanduser(name)
    if os.path.isdir(path):
        return "folder"
    if os.path.isfile(path):
        raise RecipeError(
            f"model: {name} is a file; to use it as the weights of an architecture, name the architecture, such as "
            f"timm/resnet50, and set --prune.weights {name} (--weights for evaluate); to convert a whole pruned "
            f"module to a folder, run `isoprune convert {name}`"
        )
    if name.startswith(("/", ".", "~")) or name.count("/") > 1:
        raise RecipeError(f"model: the folder {name!r:.99} does not exist")
    if "/" not in name or name.startswith(("timm/", "torchvision/")):
        return "architecture"
    if not _HUB_ID.fullmatch(name):
        raise RecipeError(f"model: {name!r:.99} is neither a folder nor a Hub id of the form owner/name")
    return "hub"


def _library(config: dict[str, Any]) -> Library:
    kind = config.get("model_type", "timm_wrapper" if "architecture" in config else None)
    if kind == "isoprune":
        return "isoprune"
    return "timm" if kind == "timm_wrapper" else "transformers"


def _folder_config(folder: Path) -> dict[str, Any]:
    try:
        config: object = read_json(folder / "config.json")
    except (OSError, ValueError) as error:
        raise RecipeError(f"model: {folder} contains no readable config.json") from error
    if not isinstance(config, dict):
        raise RecipeError(f"model: {folder}/config.json must contain a JSON object")
    return config


def _hub_config(name: str, revision: str | None) -> dict[str, Any]:
    try:
        config = PreTrainedConfig.get_config_dict(name, revision=revision)[0]
    except (OSError, RecursionError, TypeError, ValueError) as error:  # not found, or not a JSON object
        raise unreadable(name, error) from error
    if is_nested_too_deeply(config):
        raise RecipeError(f"model: config.json of {name} is nested too deeply for the config of a model")
    return config


def _commit(name: str, revision: str | None) -> str | None:
    """Return the commit of the files that are read; None if the cache does not tell it."""
    file = cached_file(name, "config.json", revision=revision)
    return extract_commit_hash(file, None)
