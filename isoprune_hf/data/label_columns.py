"""The column `label` of a split: one class for each image, or a list of classes, in which several or none may be.

`is_multi_label` tells which; `read_labels` and `read_label_lists` read the column, `encoder_of` makes targets of it.
"""

import json
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import numpy as np
import pyarrow as pa
from datasets import ClassLabel, Dataset, IterableDataset, LargeList, List
from timm.data import MultiLabelTarget  # type: ignore[attr-defined]  # timm re-exports it without __all__
from torch import Tensor

Split: TypeAlias = Dataset | IterableDataset


def is_list(feature: Any) -> bool:
    """Return whether a column has lists."""
    return isinstance(feature, List | LargeList)


def label_kind(feature: Any) -> Any:
    """Return the type of the labels of a column: that of the entries of its lists, or its own."""
    return feature.feature if isinstance(feature, List | LargeList) else feature


def is_multi_label(split: Any, name: str = "label") -> bool:
    """Return whether each image of a split has a list of classes."""
    return isinstance(split, Dataset | IterableDataset) and is_list((split.features or {}).get(name))


def class_count(split: Any) -> int:
    """Return the number of classes in the lists of a split; 0 if its images have one class each."""
    return int(label_kind(split.features["label"]).num_classes) if is_multi_label(split) else 0


def class_feature(names: Sequence[str], *, in_lists: bool) -> ClassLabel | List:
    """Return the type of a column of classes, or of lists of classes."""
    feature = ClassLabel(names=list(names))
    return List(feature) if in_lists else feature


def read_labels(split: Dataset, name: str = "label") -> np.ndarray:
    """Return the labels, of shape (N,); a missing label is -1."""
    column = split.select_columns(name).with_format("arrow")[:][name]
    labels: np.ndarray = column.cast(pa.int64()).fill_null(-1).to_numpy()
    return labels


def read_label_lists(split: Dataset, name: str = "label") -> list[list[Any] | None]:
    """Return the list of each image, in the order of the split; None for a missing one."""
    lists: list[list[Any] | None] = split.select_columns(name).with_format("arrow")[:][name].to_pylist()
    return lists


def read_all_labels(split: Dataset, name: str = "label") -> np.ndarray:
    """Return the labels of all images one after another; a missing one is -1, and an empty list gives none."""
    if not is_multi_label(split, name):
        return read_labels(split, name)
    lists = ([-1] if labels is None else labels for labels in read_label_lists(split, name))
    return np.array([-1 if label is None else label for labels in lists for label in labels], dtype=np.int64)


def read_strata(split: Dataset) -> np.ndarray:
    """Return a number for each image, (N,), equal for images of the same class, or of the same set of classes."""
    if not is_multi_label(split):
        return read_labels(split)
    sets = [tuple(sorted({*(labels or ())})) for labels in read_label_lists(split)]
    places = {found: place for place, found in enumerate(sorted({*sets}))}
    return np.array([places[found] for found in sets])


def count_unlabelled(split: Dataset, classes: int) -> int:
    """Return the number of images without a label, or with one that is no class; an empty list says that none fits."""
    if not is_multi_label(split):
        labels = read_labels(split)
        return int(((labels < 0) | (labels >= classes)).sum())
    return sum(
        labels is None or any(label is None or not 0 <= label < classes for label in labels)
        for labels in read_label_lists(split)
    )


def label_bytes(split: Dataset) -> bytes:
    """Return the labels of all images in order, for a digest."""
    if is_multi_label(split):
        return json.dumps(read_label_lists(split)).encode()
    return read_labels(split).tobytes()


def encoder_of(split: Any) -> Callable[[Any], Tensor] | None:
    """Return a function from the list of an image to its target: zeros and ones in float32, of shape (classes,).

    Return None if the images have one class each, or have their targets already.
    """
    return MultiLabelTarget(class_count(split)) if is_multi_label(split) else None
