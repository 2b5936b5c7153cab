"""The folder of a uniform layout: a stock transformers model whose config has an additional entry `isoprune`.

`save_stock` writes such a folder, `isoprune_fields` reads the IsoPruneConfig fields of any config.json.
"""

import json
from pathlib import Path
from typing import Any

from transformers import BaseImageProcessor, PilBackend

from isoprune_hf.checkpoint.image_processor import IsoImageProcessor, channels_of
from isoprune_hf.checkpoint.modeling_isoprune import IsoPruneConfig
from isoprune_hf.checkpoint.plain_values import require
from isoprune_hf.checkpoint.pretrained import IsoPrunePreTrainedModel
from isoprune_hf.checkpoint.rebuild import settle_config
from isoprune_hf.errors import CheckpointError

ENTRY = "isoprune"  # transformers keeps unknown entries of a config
_ENTRY_FIELDS = ("source", "cost", "recipe", "stage", "format_version")


def save_stock(folder: Path, model: IsoPrunePreTrainedModel) -> None:
    """Write config and weights of the inner transformers model, with the `isoprune` entry, into a folder.

    Raises:
        CheckpointError: A stock config does not describe the model.
    """
    settle_config(model, model.config)
    changed = [name for name in ("settings", "modules") if (model.config.base or {}).get(name)]
    require(not changed, f"prune.layout uniform: a stock config has no place for the changed {' and '.join(changed)}")
    model.model.save_pretrained(folder, save_original_format=False)
    path = folder / "config.json"
    text = stock_config_text(json.loads(path.read_text(encoding="utf-8")), model.config)
    path.write_text(text, encoding="utf-8", newline="\n")


def stock_config_text(values: dict[str, Any], config: IsoPruneConfig) -> str:
    """Return the text of a stock config.json with the labels, the problem type and the `isoprune` entry of `config`.

    Args:
        values: Values of the stock config.
        config: Config of the pruned model.
    """
    labels = {
        "id2label": {str(index): name for index, name in (config.id2label or {}).items()},
        "label2id": dict(config.label2id or {}),
    }
    problem = {} if config.problem_type is None else {"problem_type": config.problem_type}
    entry = {name: getattr(config, name) for name in _ENTRY_FIELDS}
    return json.dumps({**values, **labels, **problem, ENTRY: entry}, indent=2, sort_keys=True) + "\n"


def entry_fields(entry: Any) -> dict[str, Any]:
    """Return the `isoprune` entry of a stock config as fields of an IsoPruneConfig; empty if it is None.

    Raises:
        CheckpointError: The entry is not a mapping.
    """
    if entry is None:
        return {}
    if not isinstance(entry, dict):
        raise CheckpointError(f"config.{ENTRY}: {entry!r:.99} is not a mapping")
    known = {name: entry[name] for name in _ENTRY_FIELDS if name in entry}
    # An empty source is still a source: without it the folder itself would be recorded as the base.
    return {**known, "source": known.get("source") or {}, "layout": "uniform"}


def isoprune_fields(values: dict[str, Any]) -> dict[str, Any] | None:
    """Return the IsoPruneConfig fields of a config.json.

    Args:
        values: Content of the file.

    Returns:
        All values if the model type is isoprune, the fields of the `isoprune` entry of a stock config, or None if
        the file has neither.

    Raises:
        CheckpointError: The entry is not a mapping.
    """
    if values.get("model_type") == "isoprune":
        return values
    if ENTRY not in values:
        return None
    side = values.get("image_size", 224)
    size = [values.get("num_channels", 3), *(side if isinstance(side, list) else (side, side))]
    shared = {
        "id2label": values.get("id2label"),
        "problem_type": values.get("problem_type"),
        "image_size": size,
        "base": {"library": "transformers"},
    }
    return {**shared, **entry_fields(values[ENTRY])}


def stock_processor(processor: BaseImageProcessor) -> BaseImageProcessor:
    """Return the transformers processor that replaces an IsoImageProcessor; other processors are returned as given.

    Its centre crop rounds down, that of IsoImageProcessor half to even as in torchvision: an image with an odd margin
    may be cropped one pixel further left or up. All other pixels are equal. It does not convert images to grey.
    """
    if not isinstance(processor, IsoImageProcessor):
        return processor
    values = {key: value for key, value in processor.to_dict().items() if not key.startswith("_")}
    if channels_of(processor) != 3:
        values["do_convert_rgb"] = False
    return PilBackend(**values)
