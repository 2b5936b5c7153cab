"""Recognise the images that figures were measured on: `fingerprint_images`."""

import hashlib
import json
from collections.abc import Sequence
from typing import Any

import numpy as np
from datasets import Dataset

from isoprune_hf.data.label_columns import is_multi_label, read_label_lists, read_labels
from isoprune_hf.limits import MAX_IMAGE_BYTES
from isoprune_hf.plain_files import read_bytes

_READ = 32  # images whose content is read, of a split of any size


def fingerprint_images(split: Dataset, label_names: Sequence[str]) -> str:
    """Return a digest of the class of every image in order, and of the content of 32 images spread over the split.

    Of lists, all classes count. It does not depend on the numbers of the classes, nor on the place of the files.

    Args:
        split: Rows with the columns `image`, encoded or as arrays, and `label`.
        label_names: Names of the classes by index.
    """
    digest = hashlib.sha256("\n".join(_names_of(split, label_names)).encode())
    for position in np.unique(np.linspace(0, len(split) - 1, _READ).astype(int)).tolist():
        digest.update(hashlib.sha256(_content(split[position]["image"])).digest())
    return digest.hexdigest()[:16]


def _names_of(split: Dataset, label_names: Sequence[str]) -> list[str]:
    """Return the name of the class of each image, or those of its classes as JSON in sorted order."""
    if not is_multi_label(split):
        return [label_names[label] for label in read_labels(split)]
    return [json.dumps(sorted({label_names[label] for label in labels or ()})) for labels in read_label_lists(split)]


def _content(image: Any) -> bytes:
    if not isinstance(image, dict):
        return np.asarray(image).tobytes()
    if image["bytes"] is not None:
        return bytes(image["bytes"])
    try:
        return read_bytes(image["path"], MAX_IMAGE_BYTES)
    except OSError:
        return b""  # reported where it is used
