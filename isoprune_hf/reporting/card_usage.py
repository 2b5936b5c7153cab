"""How a card says that a folder is opened: by a pipeline, or by a call of the network; `describe_usage`."""

import re
from pathlib import Path
from typing import Any

from isoprune_hf.checkpoint.own_network import inputs_of

_BUILDER = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_][\w.]*", re.ASCII)  # of a network of no library


def describe_usage(folder: Path, config: dict[str, Any]) -> dict[str, Any]:
    """Return variables of the template: `builder`, `has_processor`, and `call` if no pipeline opens the folder."""
    return {
        "builder": _builder(config.get("base") or {}),
        "call": None if _has_pipeline(config, folder) else _call(config),
        "has_processor": _has_processor(folder),
    }


def _has_pipeline(config: dict[str, Any], folder: Path) -> bool:
    """Return whether `pipeline` opens a folder: it has an image processor, needs no builder, and is no backbone."""
    base = config.get("base") or {}
    kinds = (base.get("config") or {}).get("architectures") or [""]
    is_backbone = str(kinds[0]).endswith("Backbone")
    return _has_processor(folder) and base.get("library") != "python" and not is_backbone


def _has_processor(folder: Path) -> bool:
    return (folder / "preprocessor_config.json").is_file()


def _builder(base: dict[str, Any]) -> dict[str, str] | None:
    """Return module and name of the builder of a network of no library, if they are names."""
    place = base.get("architecture")
    if base.get("library") != "python" or not isinstance(place, str) or not _BUILDER.fullmatch(place):
        return None
    module, _, name = place.partition(":")
    return {"place": place, "module": module, "name": name, "first": name.partition(".")[0]}


def _call(config: dict[str, Any]) -> str:
    """Return the arguments of a call of the network with random inputs."""
    inputs = inputs_of(config.get("base"), config.get("image_size"))
    made = [(name, f"torch.randn({', '.join(map(str, [1, *shape]))})") for name, shape in inputs]
    given = [value for name, value in made if name is None]
    return ", ".join(given + [f"{name}={value}" for name, value in made if name is not None])
