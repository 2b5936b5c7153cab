"""Labelled images: two splits with the same columns and the same classes.

Images stay encoded until they are used; `decoding` reads them then.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from datasets import ClassLabel, Dataset, Features, Image, IterableDataset, List, Value

from isoprune_hf.data.decoding import Decoding
from isoprune_hf.data.sources import find_column, open_splits, read_labels
from isoprune_hf.errors import DatasetError
from isoprune_hf.recipes import DataRecipe


@dataclass(frozen=True)
class ImageData:
    """Two splits with exactly the columns `image` and `label`.

    Args:
        train: For calibration and finetuning; a stream with `data.streaming`.
        evaluation: For evaluation.
        label_names: Names of the classes by index.
        name: What `data.dataset` said.
        fingerprint: Digest of the class names and of the labels of both splits in their order; equal on every machine.
            Those of a stream are not known, and no part of it.
        decoding: How their images are read.
        buffer: Rows of `train` that are shuffled at once, where it is a stream; None where not.
    """

    train: Dataset | IterableDataset | None
    evaluation: Dataset | None
    label_names: tuple[str, ...]
    name: str
    fingerprint: str
    decoding: Decoding = field(default_factory=Decoding)
    buffer: int | None = None


def load_data(recipe: DataRecipe) -> ImageData:
    """Open the data set; a split that it does not have is None.

    Raises:
        DatasetError: It is not there, or its splits, columns or labels are not those of an image classification.
    """
    splits = {name: _select_columns(split, name, recipe) for name, split in open_splits(recipe).items()}
    splits, label_names = _name_classes(splits, recipe)
    digest = hashlib.sha256("\n".join(label_names).encode())
    for name in (recipe.train_split, recipe.eval_split):
        is_known = isinstance(splits.get(name), Dataset)
        digest.update(read_labels(splits[name]).tobytes() if is_known else b"stream" if name in splits else b"none")
    return ImageData(
        train=splits.get(recipe.train_split),
        evaluation=splits.get(recipe.eval_split),
        label_names=label_names,
        name=str(recipe.dataset),
        fingerprint=digest.hexdigest()[:16],
        decoding=Decoding(
            broken=recipe.broken, max_broken=recipe.max_broken, exif=recipe.exif, decoder=recipe.decoder
        ),
        buffer=recipe.shuffle_buffer if recipe.streaming else None,
    )


def leave_encoded(split: Sequence[dict[str, Any]]) -> Sequence[dict[str, Any]]:
    """Give the rows of a split with their images as they are stored: a path, or bytes; other rows as they are."""
    return split.cast_column("image", Image(decode=False)) if isinstance(split, Dataset) else split


def _select_columns(split: Dataset, name: str, recipe: DataRecipe) -> Dataset:
    image, label = (find_column(split, setting, recipe) for setting in ("image_column", "label_column"))
    for setting, column in (("image_column", image), ("label_column", label)):
        if column not in split.features:
            raise DatasetError(
                f"data.{setting}: split {name!r} of {recipe.dataset!r} has no column {column!r}, it has "
                f"{', '.join(split.column_names)}"
            )
    feature = split.features[image]
    encoded = feature == Value("binary") or (isinstance(feature, dict) and feature.keys() == {"bytes", "path"})
    if not encoded and not isinstance(feature, Image):
        raise DatasetError(
            f"data.image_column: column {image!r} of {recipe.dataset!r} must hold images, got {feature}"
        )
    is_stream = isinstance(split, IterableDataset)
    if is_stream or encoded or not feature.decode:
        # The rows of a stream come as they are cast here, and whatever else is done to it would decode them.
        split = split.cast_column(image, Image(decode=not is_stream))
    renamed = {name: new for name, new in ((image, "image"), (label, "label")) if name != new}
    return split.select_columns([image, label]).rename_columns(renamed)


def _name_classes(splits: dict[str, Dataset], recipe: DataRecipe) -> tuple[dict[str, Dataset], tuple[str, ...]]:
    """Make every label column a ClassLabel with the same names; return the splits and the names."""
    where = f"data.label_column: column {recipe.label_column!r} of {recipe.dataset!r}"
    kinds = {name: split.features["label"] for name, split in splits.items()}
    if any(not isinstance(kind, ClassLabel) for kind in kinds.values()):
        for kind in kinds.values():
            if not isinstance(kind, ClassLabel) and "int" not in getattr(kind, "dtype", ""):
                raise DatasetError(f"{where} must hold class labels or the whole numbers 0 to n-1, got {kind}")
        known = [split for split in splits.values() if isinstance(split, Dataset)]
        if not known:
            raise DatasetError(f"{where} has numbers alone, and a stream does not say how many: name the classes")
        numbers = np.unique(np.concatenate([read_labels(split) for split in known])).tolist()
        if numbers != list(range(len(numbers))):
            raise DatasetError(
                f"{where} must hold class labels or the whole numbers 0 to n-1, got {_shorten(numbers)}"
            )
        feature = ClassLabel(names=[str(number) for number in numbers])
        return {name: split.cast_column("label", feature) for name, split in splits.items()}, tuple(feature.names)
    (first, kind), *rest = kinds.items()
    for name, other in rest:
        if other.names != kind.names:
            raise DatasetError(
                f"{where}: the classes of {first!r} and {name!r} differ: {_shorten(kind.names)} and "
                f"{_shorten(other.names)}; give every split the same classes"
            )
    for name, split in splits.items():
        if not isinstance(split, Dataset):
            continue  # checked row by row
        labels = read_labels(split)
        unlabelled = int(((labels < 0) | (labels >= len(kind.names))).sum())
        if unlabelled:
            raise DatasetError(
                f"{where}: {unlabelled} of {len(labels)} images of split {name!r} have no label; choose another split"
            )
    return splits, tuple(kind.names)


def _shorten(values: Sequence[object]) -> str:
    return ", ".join(map(str, values[:5])) + (f", ... ({len(values)})" if len(values) > 5 else "")


def prediction_features() -> Features:
    """Return the columns of a metric of predictions, for `evaluate`."""
    return Features(
        {
            "predictions": List(Value("int64")),
            "references": Value("int64"),
            "losses": Value("float64"),
            "confidences": Value("float64"),
        }
    )
