"""The folder of a uniform layout: a stock model of transformers, with what we know of it as an entry of its config."""

import json
from pathlib import Path
from typing import Any

from transformers import BaseImageProcessor, PilBackend

from isoprune_hf.checkpoint.modeling_isoprune import (
    IsoImageProcessor,
    IsoPruneConfig,
    IsoPruneForImageClassification,
)
from isoprune_hf.errors import CheckpointError

ENTRY = "isoprune"  # transformers keeps entries of a config that it does not know
_FIELDS = ("source", "cost", "recipe", "stage", "format_version")


def save_stock(folder: Path, model: IsoPruneForImageClassification) -> None:
    """Write config and weights of the stock model inside, and the entry, into a folder."""
    model.model.save_pretrained(folder, save_original_format=False)
    path = folder / "config.json"
    path.write_text(stock_config_text(json.loads(path.read_text()), model.config))


def stock_config_text(values: dict[str, Any], config: IsoPruneConfig) -> str:
    """Write a stock config with the labels and the entry of ours.

    Args:
        values: The stock config.
        config: What we know of the model.
    """
    labels = {
        "id2label": {str(index): name for index, name in config.id2label.items()},
        "label2id": dict(config.label2id),
    }
    entry = {name: getattr(config, name) for name in _FIELDS}
    return json.dumps({**values, **labels, ENTRY: entry}, indent=2, sort_keys=True) + "\n"


def entry_fields(entry: Any) -> dict[str, Any]:
    """Read the entry as fields of an IsoPruneConfig; none where the config has no entry.

    Raises:
        CheckpointError: The entry is no mapping.
    """
    if entry is None:
        return {}
    if not isinstance(entry, dict):
        raise CheckpointError(f"config.{ENTRY}: {entry!r:.99} is no mapping")
    known = {name: entry[name] for name in _FIELDS if name in entry}
    return {**known, "source": known.get("source") or {}, "layout": "uniform"}  # its own: not this folder


def our_values(values: dict[str, Any]) -> dict[str, Any] | None:
    """Give the values of our config in a config.json: the whole file, or its entry; None where there are none."""
    if values.get("model_type") == "isoprune":
        return values
    if ENTRY not in values:
        return None
    side = values.get("image_size", 224)
    size = [values.get("num_channels", 3), *(side if isinstance(side, list) else (side, side))]
    shared = {"id2label": values.get("id2label"), "image_size": size, "base": {"library": "transformers"}}
    return {**shared, **entry_fields(values[ENTRY])}


def stock_processor(processor: BaseImageProcessor) -> BaseImageProcessor:
    """Give the processor of transformers that makes the pixels of ours; another processor is one already.

    Its centre crop rounds down where ours rounds half to even, as torchvision does: an image whose margin is odd may
    be cropped one pixel further left or up. All other pixels are equal.
    """
    if not isinstance(processor, IsoImageProcessor):
        return processor
    values = {key: value for key, value in processor.to_dict().items() if not key.startswith("_")}
    return PilBackend(**values)
