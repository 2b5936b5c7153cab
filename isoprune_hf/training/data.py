"""Labelled images: where they come from.

Images stay encoded until they are used; `decoding` reads them then.
"""

import hashlib
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from tarfile import TarError
from typing import Any

import numpy as np
import pyarrow as pa
from datasets import ClassLabel, Dataset, Features, Image, List, Value, load_dataset, load_from_disk
from datasets.exceptions import DatasetsError
from datasets.packaged_modules.webdataset.webdataset import WebDataset
from PIL import Image as PILImage

from isoprune_hf.errors import DatasetError
from isoprune_hf.extras import naming_extra
from isoprune_hf.recipes import DataRecipe
from isoprune_hf.training.decoding import Decoding

_KINDS = "give `digits`, a folder of parquet or tar files, a folder with train/CLASS and val/CLASS, or a Hub id"
# What the columns are named in tar files, by WebDataset's convention.
_IN_TARS = {"image_column": ("jpg", "jpeg", "png", "webp"), "label_column": ("cls",)}


@dataclass(frozen=True)
class ImageData:
    """Two splits with exactly the columns `image` and `label`.

    Args:
        train: For calibration and finetuning.
        evaluation: For evaluation.
        label_names: Names of the classes by index.
        name: What `data.dataset` said.
        fingerprint: Digest of the class names and of the labels of both splits in their order; equal on every machine.
        decoding: How their images are read.
    """

    train: Dataset | None
    evaluation: Dataset | None
    label_names: tuple[str, ...]
    name: str
    fingerprint: str
    decoding: Decoding = field(default_factory=Decoding)


def load_data(recipe: DataRecipe) -> ImageData:
    """Open the data set; a split that it does not have is None.

    Raises:
        DatasetError: It is not there, or its splits, columns or labels are not those of an image classification.
    """
    with _only_labels_decoded():
        splits = {name: _select_columns(split, name, recipe) for name, split in _open(recipe).items()}
    splits, label_names = _name_classes(splits, recipe)
    digest = hashlib.sha256("\n".join(label_names).encode())
    for name in (recipe.train_split, recipe.eval_split):
        digest.update(_labels(splits[name]).tobytes() if name in splits else b"none")
    return ImageData(
        train=splits.get(recipe.train_split),
        evaluation=splits.get(recipe.eval_split),
        label_names=label_names,
        name=str(recipe.dataset),
        fingerprint=digest.hexdigest()[:16],
        decoding=Decoding(
            broken=recipe.broken, max_broken=recipe.max_broken, exif=recipe.exif, decoder=recipe.decoder
        ),
    )


@contextmanager
def _only_labels_decoded() -> Iterator[None]:
    """Let `datasets` read numbers from tar files, and leave all else as bytes, pickles among them."""
    decoders = WebDataset.DECODERS
    WebDataset.DECODERS = {ending: decoder for ending, decoder in decoders.items() if decoder is int}
    try:
        yield
    finally:
        WebDataset.DECODERS = decoders


def _open(recipe: DataRecipe) -> dict[str, Dataset]:
    """Open those of the two splits that the data set has."""
    if not recipe.dataset:
        raise DatasetError(f"data.dataset is not set; {_KINDS}")
    if recipe.dataset == "digits":
        return _asked(_load_digits(), recipe)
    folder = Path(recipe.dataset).expanduser()
    try:
        if not folder.is_dir():
            return _asked(load_dataset(recipe.dataset, revision=recipe.revision), recipe)
        if (folder / "dataset_dict.json").is_file():
            return _asked(load_from_disk(str(folder)), recipe)
        for kind, ending in (("parquet", "parquet"), ("webdataset", "tar")):
            files = _files_of_splits(folder, ending, recipe)
            if files:
                opened = dict(load_dataset(kind, data_files=_asked(files, recipe)))
                return _name_by_list(opened, folder / "classes.txt", recipe)
        folders = {_split_name(path.name): path for path in sorted(folder.iterdir()) if any(path.glob("*/*"))}
        if not folders:
            raise DatasetError(
                f"data.dataset: the folder {str(folder)!r} has no parquet, no tar files and no split folders; {_KINDS}"
            )
        # One split at a time: opened together, `datasets` would merge the class names of all splits.
        return {name: _load_image_folder(path) for name, path in _asked(folders, recipe).items()}
    except DatasetError:
        raise
    except (DatasetsError, TarError, OSError, ValueError, RuntimeError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise DatasetError(f"data.dataset: {recipe.dataset!r} cannot be opened ({reason}); {_KINDS}") from error


def _files_of_splits(folder: Path, ending: str, recipe: DataRecipe) -> dict[str, list[str]]:
    """Sort files by split: an asked one that their folder or a word of their name says, or else the first word."""
    files: dict[str, list[str]] = {}
    for path in sorted([*folder.glob(f"*.{ending}"), *folder.glob(f"*/*.{ending}")]):
        words = [_split_name(word) for word in (path.parent.name, *re.split(r"[-.]", path.name))]
        known = [word for word in words if word in (recipe.train_split, recipe.eval_split)]
        files.setdefault((known or words[1:])[0], []).append(str(path))
    return files


def _name_by_list(splits: dict[str, Dataset], file: Path, recipe: DataRecipe) -> dict[str, Dataset]:
    """Take the class names from a file beside the shards, a line each, where the labels are bare numbers."""
    names = file.read_text(encoding="utf-8").splitlines() if file.is_file() else []
    named = {}
    for name, split in splits.items():
        column = _column(split, "label_column", recipe)
        feature = split.features.get(column)
        if names and not isinstance(feature, ClassLabel) and "int" in getattr(feature, "dtype", ""):
            numbers = _labels(split, column)
            if numbers.min() < 0 or numbers.max() >= len(names):
                raise DatasetError(
                    f"data.dataset: {file} names {len(names)} classes, the labels of split {name!r} go from "
                    f"{numbers.min()} to {numbers.max()}"
                )
            split = split.cast_column(column, ClassLabel(names=names))
        named[name] = split
    return named


def _column(split: Dataset, setting: str, recipe: DataRecipe) -> str:
    """Name the column that a setting means; where it is left as it is, WebDataset's names do, too."""
    asked = getattr(recipe, setting)
    others = _IN_TARS[setting] if asked == getattr(DataRecipe, setting) else ()
    return next((name for name in (asked, *others) if name in split.features), asked)


def _split_name(name: str) -> str:
    return "validation" if name == "val" else name


def _asked(available: Mapping[str, Any], recipe: DataRecipe) -> dict[str, Any]:
    found = {name: available[name] for name in (recipe.train_split, recipe.eval_split) if name in available}
    if not found:
        raise DatasetError(
            f"data.dataset: {recipe.dataset!r} has neither the split {recipe.train_split!r} nor "
            f"{recipe.eval_split!r}, it has {', '.join(map(str, available))}; set data.train_split and data.eval_split"
        )
    return found


def _load_image_folder(folder: Path) -> Dataset:
    files = {"train": "*/*"}
    return load_dataset("imagefolder", data_dir=str(folder), data_files=files, drop_labels=False, split="train")


def _load_digits() -> dict[str, Dataset]:
    with naming_extra("data.dataset digits"):
        from sklearn.datasets import load_digits
        from sklearn.model_selection import train_test_split
    digits = load_digits()
    features = Features({"image": Image(), "label": ClassLabel(names=[str(digit) for digit in range(10)])})
    pixels = np.round(digits.images * (255 / 16)).astype(np.uint8)
    images = [
        PILImage.fromarray(image).convert("RGB").resize((16, 16), PILImage.Resampling.BILINEAR) for image in pixels
    ]
    parts = train_test_split(range(len(images)), test_size=0.25, random_state=0, stratify=digits.target)
    return {
        name: Dataset.from_dict({"image": [images[i] for i in part], "label": digits.target[part]}, features=features)
        for name, part in zip(("train", "validation"), map(sorted, parts), strict=True)
    }


def leave_encoded(split: Sequence[dict[str, Any]]) -> Sequence[dict[str, Any]]:
    """Give the rows of a split with their images as they are stored: a path, or bytes; other rows as they are."""
    return split.cast_column("image", Image(decode=False)) if isinstance(split, Dataset) else split


def _select_columns(split: Dataset, name: str, recipe: DataRecipe) -> Dataset:
    image, label = (_column(split, setting, recipe) for setting in ("image_column", "label_column"))
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
    columns = {image: "image", label: "label"}
    split = split.select_columns(list(columns)).rename_columns(columns)
    return split.cast_column("image", Image()) if encoded or not feature.decode else split


def _labels(split: Dataset, name: str = "label") -> np.ndarray:
    """Return the labels, of shape (N,); a missing label is -1."""
    column = split.select_columns(name).with_format("arrow")[:][name]
    return column.cast(pa.int64()).fill_null(-1).to_numpy()


def _name_classes(splits: dict[str, Dataset], recipe: DataRecipe) -> tuple[dict[str, Dataset], tuple[str, ...]]:
    """Make every label column a ClassLabel with the same names; return the splits and the names."""
    where = f"data.label_column: column {recipe.label_column!r} of {recipe.dataset!r}"
    kinds = {name: split.features["label"] for name, split in splits.items()}
    if any(not isinstance(kind, ClassLabel) for kind in kinds.values()):
        for kind in kinds.values():
            if not isinstance(kind, ClassLabel) and "int" not in getattr(kind, "dtype", ""):
                raise DatasetError(f"{where} must hold class labels or the whole numbers 0 to n-1, got {kind}")
        numbers = np.unique(np.concatenate([_labels(split) for split in splits.values()])).tolist()
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
        labels = _labels(split)
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
