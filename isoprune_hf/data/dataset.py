"""Labelled images: two splits with the same columns and the same classes; call `load_data`.

Images stay encoded until they are used; `decoding` reads them then.
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from datasets import Array3D, ClassLabel, Dataset, Features, Image, IterableDataset, List, Value, concatenate_datasets

from isoprune_hf.data.class_names import Split, read_labels, shorten, unite_classes
from isoprune_hf.data.decoding import Decoding, Rows
from isoprune_hf.data.sources import find_column, open_splits
from isoprune_hf.errors import DatasetError
from isoprune_hf.recipes import DataRecipe


@dataclass(frozen=True)
class ImageData:
    """Two splits with exactly the columns `image` and `label`.

    Args:
        train: For calibration and finetuning; a stream with `data.streaming`.
        evaluation: For evaluation; a sample of the split with `data.eval_images`.
        label_names: Names of the classes by index.
        name: Value of `data.dataset`.
        fingerprint: Digest of the class names and of the labels of both splits in their order; equal on every machine.
            It leaves out the labels of a stream, which are not known.
        decoding: How the images are read.
        buffer: Number of rows of `train` that are shuffled together if it is a stream, else None.
        split_images: Number of images of the evaluation split if `evaluation` is a sample of it, else None.
        is_order_ambiguous: The classes have the order of their sorted names, and sorted by characters they would have
            another one; the labels of a model without names of classes may have either.
    """

    train: Dataset | IterableDataset | None
    evaluation: Dataset | None
    label_names: tuple[str, ...]
    name: str
    fingerprint: str
    decoding: Decoding = field(default_factory=Decoding)
    buffer: int | None = None
    split_images: int | None = None
    is_order_ambiguous: bool = False

    def with_sample(self, figures: dict[str, float | int]) -> dict[str, float | int]:
        """Return figures of an evaluation with `split_images`, if they are those of a sample."""
        return figures if self.split_images is None else {**figures, "split_images": self.split_images}


def load_data(recipe: DataRecipe) -> ImageData:
    """Open the data set of a recipe; a split that it does not have is None.

    Raises:
        DatasetError: The data set cannot be opened, or its splits, columns or labels do not fit image classification.
    """
    opened = open_splits(recipe)
    selected = {name: [_select(part, name, recipe) for part in parts] for name, parts in opened.splits.items()}
    splits, label_names = _name_classes(selected, recipe)
    digest = hashlib.sha256("\n".join(label_names).encode())
    for name in (recipe.train_split, recipe.eval_split):
        split = splits.get(name)
        if isinstance(split, Dataset):
            digest.update(read_labels(split).tobytes())
        else:
            digest.update(b"none" if split is None else b"stream")
    whole = splits.get(recipe.eval_split)
    evaluation = _sample(whole, recipe.eval_images) if isinstance(whole, Dataset) else None
    is_sample = evaluation is not None and evaluation is not whole
    return ImageData(
        train=splits.get(recipe.train_split),
        evaluation=evaluation,
        label_names=label_names,
        name=str(recipe.dataset),
        fingerprint=digest.hexdigest()[:16],
        decoding=Decoding(
            broken=recipe.broken, max_broken=recipe.max_broken, exif=recipe.exif, decoder=recipe.decoder
        ),
        buffer=recipe.shuffle_buffer if recipe.streaming else None,
        split_images=len(whole) if isinstance(whole, Dataset) and is_sample else None,
        is_order_ambiguous=opened.is_sorted and list(label_names) != sorted(label_names),
    )


def _sample(split: Dataset, count: int | None) -> Dataset:
    """Return a sample of so many images in the order of the split; the split itself if it has no more."""
    if count is None or count >= len(split):
        return split
    return split.select(np.sort(np.random.default_rng(0).permutation(len(split))[:count]))


def labelled_rows(rows: Dataset) -> ImageData:
    """Return rows with the columns `image` and `label` as a training split.

    Raises:
        DatasetError: The rows have no such columns.
    """
    recipe = DataRecipe(dataset="rows")
    splits, label_names = _name_classes({"train": [_select(rows, "train", recipe)]}, recipe)
    digest = hashlib.sha256("\n".join(label_names).encode() + read_labels(splits["train"]).tobytes())
    return ImageData(splits["train"], None, label_names, "rows", digest.hexdigest()[:16])


def with_encoded_images(rows: Rows) -> Rows:
    """Return the rows of a data set with their images as stored: a path or bytes, or an array of uint8.

    Other rows are returned unchanged.
    """
    if not isinstance(rows, Dataset):
        return rows
    encoded: Rows
    if isinstance(rows.features["image"], Array3D):
        encoded = rows.with_format("numpy", columns=["image"], output_all_columns=True, dtype=np.uint8)
    else:
        encoded = rows.cast_column("image", Image(decode=False))
    return encoded


def _select(split: Split, name: str, recipe: DataRecipe) -> Split:
    """Reduce a split to the columns `image` and `label`, with images as encoded files or as arrays."""
    image = find_column(split, "image_column", recipe)
    label = find_column(split, "label_column", recipe)
    for setting, column in (("image_column", image), ("label_column", label)):
        if column not in split.features:
            raise DatasetError(
                f"data.{setting}: split {name!r} of {recipe.dataset!r} has no column {column!r}; its columns are "
                f"{', '.join(split.column_names)}"
            )
    feature = split.features[image]
    is_encoded = feature == Value("binary") or (isinstance(feature, dict) and feature.keys() == {"bytes", "path"})
    is_array = isinstance(feature, Array3D) and feature.dtype == "uint8"
    if not is_encoded and not is_array and not isinstance(feature, Image):
        raise DatasetError(
            f"data.image_column: column {image!r} of {recipe.dataset!r} must contain images, or arrays of uint8 "
            f"(Array3D), got {feature}"
        )
    is_stream = isinstance(split, IterableDataset)
    if not is_array and (is_stream or is_encoded or not feature.decode):
        # A stream must be cast here: any later operation on it would decode its images.
        split = split.cast_column(image, Image(decode=not is_stream))
    renamed = {old: new for old, new in ((image, "image"), (label, "label")) if old != new}
    return split.select_columns([image, label]).rename_columns(renamed)


def _name_classes(
    splits: Mapping[str, Sequence[Split]], recipe: DataRecipe
) -> tuple[dict[str, Split], tuple[str, ...]]:
    """Make every label column a ClassLabel with the same names, and join the parts of each split.

    Returns:
        The splits, and the names.
    """
    where = f"data.label_column: column {recipe.label_column!r} of {recipe.dataset!r}"
    places = [name for name, parts in splits.items() for _ in parts]
    parts = [part for parts in splits.values() for part in parts]
    united, names = unite_classes(_as_classes(parts, where), places, where)
    for name, part in zip(places, united, strict=True):
        if not isinstance(part, Dataset):
            continue  # a stream is checked row by row
        labels = read_labels(part)
        unlabelled = int(((labels < 0) | (labels >= len(names))).sum())
        if unlabelled:
            raise DatasetError(
                f"{where}: {unlabelled} of {len(labels)} images of split {name!r} have no label; choose another split"
            )
    rest = iter(united)
    joined = {name: [next(rest) for _ in parts] for name, parts in splits.items()}
    return {
        name: found[0] if len(found) == 1 else concatenate_datasets(found) for name, found in joined.items()
    }, names


def _as_classes(parts: Sequence[Split], where: str) -> list[Split]:
    """Turn label columns with the whole numbers 0 to n-1 into a ClassLabel with these numbers as names."""
    kinds = [part.features["label"] for part in parts]
    if all(isinstance(kind, ClassLabel) for kind in kinds):
        return list(parts)
    for kind in kinds:
        if not isinstance(kind, ClassLabel) and "int" not in getattr(kind, "dtype", ""):
            raise DatasetError(f"{where} must contain class labels or the whole numbers 0 to n-1, got {kind}")
    known = [read_labels(part) for part in parts if isinstance(part, Dataset)]
    if not known:
        raise DatasetError(
            f"{where} contains numbers, and the number of classes of a stream is unknown; name the classes, or add an "
            "evaluation split"
        )
    numbers = np.unique(np.concatenate(known)).tolist()
    if numbers != list(range(len(numbers))):
        raise DatasetError(f"{where} must contain class labels or the whole numbers 0 to n-1, got {shorten(numbers)}")
    feature = ClassLabel(names=[str(number) for number in numbers])
    return [part.cast_column("label", feature) for part in parts]


def prediction_features() -> Features:
    """Return the columns that the metrics of `evaluation` take, for the `evaluate` library."""
    return Features(
        {
            "predictions": List(Value("int64")),
            "references": Value("int64"),
            "losses": Value("float64"),
            "confidences": Value("float64"),
        }
    )
