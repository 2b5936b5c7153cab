"""The names of the classes of a data set: one list for all of its parts, and labels that are indices into it.

`unite_classes` gives parts of a data set the same classes by name; `renumber_split` replaces the labels of one split.
"""

import re
from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
from datasets import Dataset, Features, IterableDataset

from isoprune_hf.data.label_columns import (
    Split,
    class_feature,
    is_multi_label,
    label_kind,
    read_label_lists,
    read_labels,
)
from isoprune_hf.errors import DatasetError

_MANY = 100  # images of which each one has a class of its own are hardly classified


def natural_key(name: str) -> list[tuple[int, int, str]]:
    """Return the key that sorts names with numbers by their values: 0, 1, 2, 10; a1, a2, a10."""
    parts = re.split(r"(\d+)", name)
    return [(0, int(part), part) if part.isdecimal() else (1, 0, part) for part in parts if part]


def unite_classes(parts: Sequence[Split], places: Sequence[str], where: str) -> tuple[list[Split], tuple[str, ...]]:
    """Align the names of parts with ClassLabel labels; labels of a part with another order or fewer names change.

    Args:
        parts: Rows with the columns `image` and `label`, a class or a list of classes in all of them.
        places: Name of each part in an error.
        where: The column, at the beginning of an error.

    Returns:
        The parts, and the names: those of the first part that has every name.

    Raises:
        DatasetError: No part has every name, or a part has a name twice.
    """
    lists = [list(label_kind(part.features["label"]).names) for part in parts]
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
    in_lists = is_multi_label(split)
    feature = class_feature(unique, in_lists=in_lists)
    if isinstance(split, IterableDataset):
        features = Features({**split.features, "label": feature})
        return split.map(partial(_renumber_row, table=table.tolist()), features=features)
    numbers: Any
    if in_lists:
        numbers = [_renumber(labels, table.tolist()) for labels in read_label_lists(split)]
    else:
        labels = read_labels(split)
        is_known = (labels >= 0) & (labels < len(table))
        numbers = np.where(is_known, table[np.where(is_known, labels, 0)], -1)
    renumbered: Dataset = split.remove_columns("label").add_column("label", numbers, feature=feature)
    return renumbered.select_columns(split.column_names)


def number_texts(parts: Sequence[Dataset], where: str) -> list[Split]:
    """Turn label columns with text, or with lists of texts, into a ClassLabel with all texts as names.

    They are sorted with numbers by their values.

    Raises:
        DatasetError: Each of many images has a text of its own, so that the column has no classes.
    """
    columns: list[list[Any]] = [read_label_lists(part) for part in parts]
    in_lists = is_multi_label(parts[0])
    lists = ((found or ()) if in_lists else [found] for column in columns for found in column)
    texts: set[str] = {text for found in lists for text in found if text}
    names = sorted(texts, key=natural_key)
    images = sum(map(len, columns))
    if len(names) >= images > _MANY:
        raise DatasetError(f"{where} has another text for each of {images} images; choose the column of the classes")
    places = {text: index for index, text in enumerate(names)}
    feature = class_feature(names, in_lists=in_lists)
    numbered: list[Split] = []
    for part, column in zip(parts, columns, strict=True):
        labels = [_number(found, places, in_lists=in_lists) for found in column]
        added: Dataset = part.remove_columns("label").add_column("label", labels, feature=feature)
        numbered.append(added.select_columns(part.column_names))
    return numbered


def _number(found: Any, places: dict[str, int], *, in_lists: bool) -> Any:
    """Return the number of a text or of each text of a list; -1 for a missing text, and None for a missing list."""
    if not in_lists:
        return places.get(found, -1)
    return None if found is None else [places.get(text, -1) for text in found]


def _renumber_row(row: dict[str, Any], table: list[int]) -> dict[str, Any]:
    return {**row, "label": _renumber(row["label"], table)}


def _renumber(label: Any, table: list[int]) -> Any:
    """Return the new number of a label or of each label of a list: -1 for one without, None for a missing one."""
    if isinstance(label, list):
        return [_renumber(entry, table) for entry in label]
    if label is None:
        return None
    return table[label] if 0 <= label < len(table) else -1


def shorten(values: Sequence[object]) -> str:
    """Return the first values, and their number if there are more."""
    return ", ".join(map(str, values[:5])) + (f", ... ({len(values)})" if len(values) > 5 else "")
