"""The names of the classes of a data set: one list for all of its parts, and labels that are indices into it.

`unite_classes` gives parts of a data set the same classes by name; `renumber_split` replaces the labels of one split.
"""

import re
from collections.abc import Sequence
from functools import partial
from typing import Any, TypeAlias

import numpy as np
import pyarrow as pa
from datasets import ClassLabel, Dataset, Features, IterableDataset

from isoprune_hf.errors import DatasetError

Split: TypeAlias = Dataset | IterableDataset

_MANY = 100  # images of which each one has a class of its own are hardly classified


def natural_key(name: str) -> list[tuple[int, int, str]]:
    """Return the key that sorts names with numbers by their values: 0, 1, 2, 10; a1, a2, a10."""
    parts = re.split(r"(\d+)", name)
    return [(0, int(part), part) if part.isdecimal() else (1, 0, part) for part in parts if part]


def unite_classes(parts: Sequence[Split], places: Sequence[str], where: str) -> tuple[list[Split], tuple[str, ...]]:
    """Align the names of parts with ClassLabel labels; labels of a part with another order or fewer names change.

    Args:
        parts: Rows with the columns `image` and `label`.
        places: Name of each part in an error.
        where: The column, at the beginning of an error.

    Returns:
        The parts, and the names: those of the first part that has every name.

    Raises:
        DatasetError: No part has every name, or a part has a name twice.
    """
    lists = [list(part.features["label"].names) for part in parts]
    names = max(lists, key=len)
    united: list[Split] = []
    for part, place, own in zip(parts, places, lists, strict=True):
        if own != names and (len(set(names)) < len(names) or not set(own) <= set(names)):
            raise DatasetError(
                f"{where}: the classes of {places[lists.index(names)]!r} and {place!r} differ: {shorten(names)} and "
                f"{shorten(own)}; give every split the same classes"
            )
        same = own == names
        united.append(part if same else renumber_split(part, names, np.array([names.index(name) for name in own])))
    return united, tuple(names)


def renumber_split(split: Split, names: Sequence[str], table: np.ndarray) -> Split:
    """Return a split whose label i is label `table[i]` of other names; a missing label stays -1."""
    # ImageNet calls two classes crane, which `datasets` does not allow.
    unique = [name if name not in names[:index] else f"{name} ({index})" for index, name in enumerate(names)]
    feature = ClassLabel(names=unique)
    if isinstance(split, IterableDataset):
        features = Features({**split.features, "label": feature})
        return split.map(partial(_renumber_row, table=table.tolist()), features=features)
    labels = read_labels(split)
    is_known = (labels >= 0) & (labels < len(table))
    numbers = np.where(is_known, table[np.where(is_known, labels, 0)], -1)
    renumbered: Dataset = split.remove_columns("label").add_column("label", numbers, feature=feature)
    return renumbered.select_columns(["image", "label"])


def number_texts(parts: Sequence[Dataset], where: str) -> list[Split]:
    """Turn label columns with text into a ClassLabel with all texts as names, sorted with numbers by their values.

    Raises:
        DatasetError: Each of many images has a text of its own, so that the column has no classes.
    """
    columns = [part.select_columns("label").with_format("arrow")[:]["label"].to_pylist() for part in parts]
    names = sorted({text for column in columns for text in column if text}, key=natural_key)
    images = sum(map(len, columns))
    if len(names) == images > _MANY:
        raise DatasetError(f"{where} has another text for each of {images} images; choose the column of the classes")
    places = {text: index for index, text in enumerate(names)}
    feature = ClassLabel(names=names)
    numbered: list[Split] = []
    for part, column in zip(parts, columns, strict=True):
        labels = np.array([places.get(text, -1) for text in column])
        added: Dataset = part.remove_columns("label").add_column("label", labels, feature=feature)
        numbered.append(added.select_columns(["image", "label"]))
    return numbered


def _renumber_row(row: dict[str, Any], table: list[int]) -> dict[str, Any]:
    label = row["label"]
    return {**row, "label": table[label] if label is not None and 0 <= label < len(table) else label}


def read_labels(split: Dataset, name: str = "label") -> np.ndarray:
    """Return the labels, of shape (N,); a missing label is -1."""
    column = split.select_columns(name).with_format("arrow")[:][name]
    labels: np.ndarray = column.cast(pa.int64()).fill_null(-1).to_numpy()
    return labels


def shorten(values: Sequence[object]) -> str:
    """Return the first values, and their number if there are more."""
    return ", ".join(map(str, values[:5])) + (f", ... ({len(values)})" if len(values) > 5 else "")
