"""Open the splits of a data set from the Hub, from files, or from a package; call `open_splits`."""

import re
from collections.abc import Mapping
from pathlib import Path
from tarfile import TarError
from typing import Any, Literal, TypeAlias

import numpy as np
import pyarrow as pa
from datasets import ClassLabel, Dataset, Features, Image, IterableDataset, load_dataset, load_from_disk
from datasets.exceptions import DatasetsError
from PIL import Image as PILImage

from isoprune_hf.data.datasets_internals import only_labels_decoded, with_known_features
from isoprune_hf.errors import DatasetError
from isoprune_hf.extras import naming_extra
from isoprune_hf.recipes import DataRecipe

Split: TypeAlias = Dataset | IterableDataset
Column = Literal["image_column", "label_column"]

_KINDS = (
    "set `digits`, a folder of parquet or tar files, a folder with train/CLASS and val/CLASS, or the id of a Hub "
    "data set"
)
# Names of the columns in tar files, by the convention of WebDataset.
_WEBDATASET_COLUMNS: dict[Column, tuple[str, ...]] = {
    "image_column": ("jpg", "jpeg", "png", "webp"),
    "label_column": ("cls",),
}


def open_splits(recipe: DataRecipe) -> dict[str, Split]:
    """Open the training and the evaluation split, or the one that exists; with `streaming`, the former as a stream.

    Raises:
        DatasetError: The data set cannot be opened, or has neither split.
    """
    with only_labels_decoded():
        if not recipe.streaming:
            return _open(recipe, (recipe.train_split, recipe.eval_split))
        streams = _open(recipe, (recipe.train_split, recipe.eval_split), streaming=True)
        whole = _open(recipe, (recipe.eval_split,)) if recipe.eval_split in streams else {}
        return {
            name: with_known_features(stream)
            for name, stream in streams.items()
            if isinstance(stream, IterableDataset)
        } | whole


def _open(recipe: DataRecipe, wanted: tuple[str, ...], *, streaming: bool = False) -> dict[str, Split]:
    if not recipe.dataset:
        raise DatasetError(f"data.dataset is not set; {_KINDS}")
    if recipe.dataset == "digits":
        return _in_memory(_wanted(_load_digits(), recipe, wanted), streaming=streaming)
    folder = Path(recipe.dataset).expanduser()
    try:
        if folder.is_dir():
            return _open_folder(folder, recipe, wanted, streaming=streaming)
        # A single split is fetched alone, so that the other one can be a stream.
        split = {wanted[0]: wanted[0]} if len(wanted) == 1 else None
        opened = load_dataset(recipe.dataset, revision=recipe.revision, streaming=streaming, split=split)
        return _wanted(opened, recipe, wanted)
    except DatasetError:
        raise
    except (DatasetsError, TarError, OSError, ValueError, RuntimeError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise DatasetError(f"data.dataset: {recipe.dataset!r} cannot be opened ({reason}); {_KINDS}") from error


def _open_folder(folder: Path, recipe: DataRecipe, wanted: tuple[str, ...], *, streaming: bool) -> dict[str, Split]:
    if (folder / "dataset_dict.json").is_file():
        return _in_memory(_wanted(load_from_disk(str(folder)), recipe, wanted), streaming=streaming)
    for kind, ending in (("parquet", "parquet"), ("webdataset", "tar")):
        files = _files_of_splits(folder, ending, recipe)
        if files:
            opened = dict(load_dataset(kind, data_files=_wanted(files, recipe, wanted), streaming=streaming))
            return _name_by_list(opened, folder / "classes.txt", recipe)
    folders = {_split_name(path.name): path for path in sorted(folder.iterdir()) if any(path.glob("*/*"))}
    if not folders:
        raise DatasetError(
            f"data.dataset: the folder {str(folder)!r} has no parquet, no tar files and no split folders; {_KINDS}"
        )
    # One split at a time: opened together, `datasets` would merge the class names of all splits.
    return {
        name: _load_image_folder(path, streaming=streaming) for name, path in _wanted(folders, recipe, wanted).items()
    }


def _files_of_splits(folder: Path, ending: str, recipe: DataRecipe) -> dict[str, list[str]]:
    """Sort files by split: the wanted split that their folder or a word of their name mentions, or the first word."""
    files: dict[str, list[str]] = {}
    for path in sorted([*folder.glob(f"*.{ending}"), *folder.glob(f"*/*.{ending}")]):
        words = [_split_name(word) for word in (path.parent.name, *re.split(r"[-.]", path.name))]
        known = [word for word in words if word in (recipe.train_split, recipe.eval_split)]
        files.setdefault((known or words[1:])[0], []).append(str(path))
    return files


def _name_by_list(splits: Mapping[str, Split], file: Path, recipe: DataRecipe) -> dict[str, Split]:
    """Name the classes of integer labels by a file next to the shards, one class per line, if it exists."""
    names = file.read_text(encoding="utf-8").splitlines() if file.is_file() else []
    named: dict[str, Split] = {}
    for name, split in splits.items():
        column = find_column(split, "label_column", recipe)
        feature = split.features.get(column)
        is_bare = bool(names) and not isinstance(feature, ClassLabel) and "int" in getattr(feature, "dtype", "")
        if is_bare and isinstance(split, Dataset):
            numbers = read_labels(split, column)
            if numbers.min() < 0 or numbers.max() >= len(names):
                raise DatasetError(
                    f"data.dataset: {file} names {len(names)} classes, but the labels of split {name!r} range from "
                    f"{numbers.min()} to {numbers.max()}; add the missing names"
                )
        named[name] = split.cast_column(column, ClassLabel(names=names)) if is_bare else split
    return named


def find_column(split: Split, setting: Column, recipe: DataRecipe) -> str:
    """Return the column that a setting means; with the default setting, WebDataset's column names are found too."""
    wanted: str = getattr(recipe, setting)
    others = _WEBDATASET_COLUMNS[setting] if wanted == getattr(DataRecipe, setting) else ()
    return next((name for name in (wanted, *others) if name in split.features), wanted)


def _split_name(name: str) -> str:
    return "validation" if name == "val" else name


def _wanted(available: Mapping[str, Any], recipe: DataRecipe, wanted: tuple[str, ...]) -> dict[str, Any]:
    found = {name: available[name] for name in wanted if name in available}
    if not found:
        raise DatasetError(
            f"data.dataset: {recipe.dataset!r} has neither the split {recipe.train_split!r} nor "
            f"{recipe.eval_split!r}, it has {', '.join(map(str, available))}; set data.train_split and data.eval_split"
        )
    return found


def _in_memory(splits: dict[str, Dataset], *, streaming: bool) -> dict[str, Split]:
    return {name: split.to_iterable_dataset() if streaming else split for name, split in splits.items()}


def _load_image_folder(folder: Path, *, streaming: bool) -> Split:
    split: Split = load_dataset(
        "imagefolder",
        data_dir=str(folder),
        data_files={"train": "*/*"},
        drop_labels=False,
        split="train",
        streaming=streaming,
    )
    return split


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


def read_labels(split: Dataset, name: str = "label") -> np.ndarray:
    """Return the labels, of shape (N,); a missing label is -1."""
    column = split.select_columns(name).with_format("arrow")[:][name]
    labels: np.ndarray = column.cast(pa.int64()).fill_null(-1).to_numpy()
    return labels
