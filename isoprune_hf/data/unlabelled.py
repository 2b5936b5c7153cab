"""Images without labels, which tasks such as image-feature-extraction take: all of them have the class `UNLABELLED`.

`read_flat_folder` reads the images of a folder without class folders, `with_label_column` data sets without labels.
"""

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from datasets import ClassLabel, Dataset, Features, Image, IterableDataset

from isoprune_hf.data.columns import (
    MASK,
    OBJECTS,
    find_column,
    find_mask_column,
    find_objects_column,
    has_label_column,
)
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

    A column that the recipe names must exist; it is not added. A column of masks gets the name `MASK`, one of boxes
    `OBJECTS`, and they are no columns of labels.

    Raises:
        DatasetError: No part has the column that the recipe names.
    """
    place, name = next(iter(splits)), recipe.label_column
    if name != DataRecipe.label_column and not any(
        name in part.features for found in splits.values() for part in found
    ):
        find_column(
            splits[place][0], "label_column", recipe, place
        )  # raises, and tells the columns by their own names
    annotated = {name: [_name_annotations(part, recipe) for part in found] for name, found in splits.items()}
    parts, given = ([part for found in both.values() for part in found] for both in (annotated, splits))
    was_annotation = any(name in part.features for part in given) and not any(name in part.features for part in parts)
    is_default = name == DataRecipe.label_column
    is_missing = not any(has_label_column(part, recipe) for part in parts) if is_default else was_annotation
    if not is_missing:
        return annotated
    return {place: [_labelled(part, name) for part in found] for place, found in annotated.items()}


def _name_annotations(part: Split, recipe: DataRecipe) -> Split:
    """Return a part whose masks, which stay encoded, are in the column `MASK`, and its boxes in `OBJECTS`."""
    objects = find_objects_column(part, recipe)
    if objects is not None:
        part = part.rename_column(objects, OBJECTS)
    name = find_mask_column(part, recipe)
    if name is None:
        return part
    part = part.cast_column(name, Image(decode=False))
    return part.rename_column(name, MASK)


def _labelled(part: Split, name: str) -> Split:
    if isinstance(part, IterableDataset):
        features = Features({**part.features, name: _FEATURE})
        return part.map(partial(_label_row, name), features=features)
    labelled: Dataset = part.add_column(name, np.zeros(len(part), dtype=np.int64), feature=_FEATURE)
    return labelled


def _label_row(name: str, row: dict[str, Any]) -> dict[str, Any]:
    return {**row, name: 0}
