"""Keep fitted times of layers for the next run on the same machine: `remembered`.

Each is a small JSON file in the cache folder of the Hugging Face libraries, `HF_HOME/assets/isoprune_hf/latency`; the
folder may be deleted at any time.
"""

import hashlib
import json
import logging
import math
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import cached_assets_path

from isoprune_hf.checkpoint.folder import write_file
from isoprune_hf.errors import WriteError
from isoprune_hf.plain_files import read_json
from isoprune_hf.pruning.cost.latency import LatencyModel

logger = logging.getLogger(__name__)


def remembered(
    conditions: Mapping[str, Any],
    layers: Collection[str],
    record: Mapping[str, Any],
    fit: Callable[[], LatencyModel],
) -> LatencyModel:
    """Return the latency model that an earlier run fitted under the same conditions, or fit and keep one.

    A file that is damaged, and a folder that cannot be written, cost a line and a measurement.

    Args:
        conditions: Everything that the times depend on, as JSON values.
        layers: Names of the layers of the model.
        record: Device and settings of the measurement.
        fit: Measures and fits.
    """
    text = json.dumps(conditions, sort_keys=True)
    try:
        file = cache_folder() / f"{hashlib.sha256(text.encode()).hexdigest()[:32]}.json"
    except (OSError, ValueError) as error:
        logger.warning(f"the times of layers are not kept for the next run: {error}")
        return fit()
    known = _read(file, layers, record)
    if known is not None:
        logger.info(f"the times of layers are those of an earlier run on this machine: {file}")
        return known
    fitted = fit()
    values = {
        "conditions": conditions,
        "fixed": fitted.fixed,
        "layers": fitted.layers,
        "multiple": fitted.multiple,
    }
    try:
        write_file(file, json.dumps(values, indent=2, sort_keys=True) + "\n")
    except WriteError as error:
        logger.warning(f"the times of layers are not kept for the next run: {error}")
    return fitted


def cache_folder() -> Path:
    """Return the folder of the files, which exists then.

    Raises:
        OSError, ValueError: It cannot be made.
    """
    return cached_assets_path("isoprune_hf", "latency", "layers")


def _read(file: Path, layers: Collection[str], record: Mapping[str, Any]) -> LatencyModel | None:
    """Read the times of some layers; return None if there is no file, and with a line if it is damaged."""
    try:
        values = read_json(file)
        times = {name: (values["layers"][name][0], values["layers"][name][1]) for name in layers}
        numbers = [values["fixed"], *(number for pair in times.values() for number in pair)]
        if not all(type(number) in (int, float) and math.isfinite(number) and number >= 0 for number in numbers):
            raise ValueError("a time is no number from 0 on")
        multiple = values["multiple"]
        if type(multiple) is not int or multiple < 1:
            raise ValueError("the multiple of widths is no whole number from 1 on")
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError, LookupError) as error:
        logger.warning(f"{file} is damaged, so the layers are measured again ({type(error).__name__}: {error})")
        return None
    return LatencyModel(values["fixed"], times, dict(record), multiple)
