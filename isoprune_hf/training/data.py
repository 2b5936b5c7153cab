"""Labelled images: where they come from, and whether their labels are the model's.

Images stay encoded until they are used; `decoding` reads them then.
"""

import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from datasets import ClassLabel, Dataset, Features, Image, List, Value, load_dataset, load_from_disk
from datasets.exceptions import DatasetsError
from PIL import Image as PILImage
from timm.data import ImageNetInfo

from isoprune_hf.errors import DatasetError
from isoprune_hf.extras import naming_extra
from isoprune_hf.recipes import DataRecipe
from isoprune_hf.training.decoding import Decoding

_SYNSET = re.compile(r"n\d{8}")
_KINDS = "give `digits`, a folder of parquet files, a folder with train/CLASS and val/CLASS, or a Hub id"


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
        parquet = [*folder.glob("*.parquet"), *folder.glob("data/*.parquet")]
        if parquet:
            files: dict[str, list[str]] = {}
            for path in sorted(parquet):
                files.setdefault(_split_name(re.split(r"[-.]", path.name)[0]), []).append(str(path))
            return dict(load_dataset("parquet", data_files=_asked(files, recipe)))
        folders = {_split_name(path.name): path for path in sorted(folder.iterdir()) if any(path.glob("*/*"))}
        if not folders:
            raise DatasetError(
                f"data.dataset: the folder {str(folder)!r} has neither parquet nor split folders; {_KINDS}"
            )
        # One split at a time: opened together, `datasets` would merge the class names of all splits.
        return {name: _load_image_folder(path) for name, path in _asked(folders, recipe).items()}
    except DatasetError:
        raise
    except (DatasetsError, OSError, ValueError, RuntimeError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise DatasetError(f"data.dataset: {recipe.dataset!r} cannot be opened ({reason}); {_KINDS}") from error


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
    for setting, column in (("image_column", recipe.image_column), ("label_column", recipe.label_column)):
        if column not in split.features:
            raise DatasetError(
                f"data.{setting}: split {name!r} of {recipe.dataset!r} has no column {column!r}, it has "
                f"{', '.join(split.column_names)}"
            )
    feature = split.features[recipe.image_column]
    encoded = feature == Value("binary") or (isinstance(feature, dict) and feature.keys() == {"bytes", "path"})
    if not encoded and not isinstance(feature, Image):
        raise DatasetError(
            f"data.image_column: column {recipe.image_column!r} of {recipe.dataset!r} must hold images, got {feature}"
        )
    columns = {recipe.image_column: "image", recipe.label_column: "label"}
    split = split.select_columns(list(columns)).rename_columns(columns)
    return split.cast_column("image", Image()) if encoded or not feature.decode else split


def _labels(split: Dataset) -> np.ndarray:
    """Return the labels, of shape (N,); a missing label is -1."""
    column = split.select_columns("label").with_format("arrow")[:]["label"]
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


def check_labels(label_names: Sequence[str], id2label: dict[int, str]) -> None:
    """Check that index i means the same class in the data and in the model.

    Generic names of the model ("LABEL_3", "3") fit anything. Names are compared in lower case up to the first comma;
    WordNet ids of the data are read as their ImageNet words where the model speaks words.

    Raises:
        DatasetError: The number of classes or their order differs.
    """
    if len(label_names) != len(id2label):
        raise DatasetError(
            f"the data has {len(label_names)} classes, the model has {len(id2label)}; "
            "give `--prune.num_labels data` for a new head"
        )
    model_names = [id2label[index] for index in range(len(id2label))]
    if all(name in (f"LABEL_{index}", str(index)) for index, name in enumerate(model_names)):
        return
    data_names = list(label_names)
    if all(map(_SYNSET.fullmatch, data_names)) and not any(map(_SYNSET.fullmatch, model_names)):
        words = ImageNetInfo("imagenet-1k").label_descriptions(as_dict=True)
        data_names = [words.get(name, name) for name in data_names]
    data_keys, model_keys = map(_normalise, data_names), [_normalise(name) for name in model_names]
    differing, crossed = [], False
    for index, key in enumerate(data_keys):
        if key != model_keys[index]:
            differing.append(index)
            crossed = crossed or key in model_keys
    if crossed or len(differing) > 0.1 * len(model_names):
        examples = "; ".join(f"index {i}: data {data_names[i]!r}, model {model_names[i]!r}" for i in differing[:3])
        raise DatasetError(
            f"the classes of the data are not those of the model at {len(differing)} of {len(model_names)} places: "
            f"{examples}; bring the data into the model's order, or give `--prune.num_labels data` for a new head"
        )


def _normalise(name: str) -> str:
    return name.split(",")[0].replace("_", " ").strip().lower()


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
