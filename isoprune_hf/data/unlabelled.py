"""Images without labels, which tasks such as image-feature-extraction take: all of them have the class `UNLABELLED`.

`read_flat_folder` reads the images of a folder without class folders, `with_label_column` data sets without labels.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from datasets import ClassLabel, Dataset, Features, Image, IterableDataset

from isoprune_hf.data.columns import has_label_column
from isoprune_hf.data.image_folders import image_files
from isoprune_hf.data.label_columns import Split
from isoprune_hf.recipes import DataRecipe

UNLABELLED = "unlabelled"
_FEATURE = ClassLabel(names=[UNLABELLED])


def read_flat_folder(folder: Path) -> Dataset:
    """Return the images that lie directly in a folder, with the columns `image` and `label`."""
    paths = [str(path) for path in image_files(folder)]
    features = Features({"image": Image(), "label": _FEATURE})
    return Dataset.from_dict({"image": paths, "label": [0] * len(paths)}, features=features)


def with_label_column(splits: Mapping[str, Sequence[Split]], recipe: DataRecipe) -> dict[str, list[Split]]:
    """Return the parts of all splits, with a column of labels if there is none in any of them.

    A column that the recipe names must exist; it is not added.
    """
    parts = [part for found in splits.values() for part in found]
    is_default = recipe.label_column == DataRecipe.label_column
    if not is_default or any(has_label_column(part, recipe) for part in parts):
        return {name: list(found) for name, found in splits.items()}
    return {name: [_labelled(part) for part in found] for name, found in splits.items()}


def _labelled(part: Split) -> Split:
    if isinstance(part, IterableDataset):
        features = Features({**part.features, "label": _FEATURE})
        return part.map(_label_row, features=features)
    labelled: Dataset = part.add_column("label", np.zeros(len(part), dtype=np.int64), feature=_FEATURE)
    return labelled


def _label_row(row: dict[str, Any]) -> dict[str, Any]:
    return {**row, "label": 0}
