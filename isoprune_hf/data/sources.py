"""Open the splits of a data set from the Hub, from files, or from a package; call `open_splits`."""

import glob
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from tarfile import TarError
from typing import Any, Literal

import numpy as np
import pyarrow.parquet as pq
from datasets import ClassLabel, Dataset, Features, Image, IterableDataset, load_dataset, load_from_disk
from datasets.exceptions import DatasetsError
from PIL import Image as PILImage

from isoprune_hf.data.class_names import Split, read_labels
from isoprune_hf.data.datasets_internals import only_labels_decoded, with_known_features
from isoprune_hf.data.image_folders import class_folders, holds_images, read_class_folders
from isoprune_hf.errors import DatasetError
from isoprune_hf.extras import naming_extra
from isoprune_hf.recipes import DataRecipe

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


@dataclass(frozen=True)
class Opened:
    """The splits of a data set as they lie in its files.

    Args:
        splits: Parts by the name of the split; each part has columns and names of classes of its own.
        is_sorted: The order of the classes is that of their sorted names, which nothing else declares.
    """

    splits: dict[str, list[Split]]
    is_sorted: bool = False


def open_splits(recipe: DataRecipe) -> Opened:
    """Open the training and the evaluation split, or the one that exists; with `streaming`, the former as a stream.

    Raises:
        DatasetError: The data set cannot be opened, or has neither split.
    """
    with only_labels_decoded():
        if not recipe.streaming:
            return _open(recipe, (recipe.train_split, recipe.eval_split))
        streams = _open(recipe, (recipe.train_split, recipe.eval_split), streaming=True)
        whole = _open(recipe, (recipe.eval_split,)).splits if recipe.eval_split in streams.splits else {}
        known = {
            name: [with_known_features(part) for part in parts if isinstance(part, IterableDataset)]
            for name, parts in streams.splits.items()
        }
        return Opened(known | whole, streams.is_sorted)


def _open(recipe: DataRecipe, wanted: tuple[str, ...], *, streaming: bool = False) -> Opened:
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
        return Opened({name: [part] for name, part in _wanted(opened, recipe, wanted).items()})
    except DatasetError:
        raise
    except (DatasetsError, TarError, OSError, ValueError, RuntimeError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise DatasetError(f"data.dataset: {recipe.dataset!r} cannot be opened ({reason}); {_KINDS}") from error


def _open_folder(folder: Path, recipe: DataRecipe, wanted: tuple[str, ...], *, streaming: bool) -> Opened:
    if (folder / "dataset_dict.json").is_file():
        return _in_memory(_wanted(load_from_disk(str(folder)), recipe, wanted), streaming=streaming)
    file = folder / "classes.txt"
    names = file.read_text(encoding="utf-8").splitlines() if file.is_file() else []
    for kind, ending in (("parquet", "parquet"), ("webdataset", "tar")):
        files = _files_of_splits(folder, ending, recipe)
        if files:
            opened = {
                name: _load_files(kind, paths, streaming=streaming)
                for name, paths in _wanted(files, recipe, wanted).items()
            }
            return Opened(_name_by_list(opened, names, recipe))
    folders = {
        _split_name(path.name): path for path in class_folders(folder) if any(map(holds_images, class_folders(path)))
    }
    if not folders:
        raise DatasetError(
            f"data.dataset: the folder {str(folder)!r} has no parquet, no tar files and no split folders; {_KINDS}"
        )
    read = {name: read_class_folders(path, names) for name, path in _wanted(folders, recipe, wanted).items()}
    return Opened(_in_memory(read, streaming=streaming).splits, is_sorted=not names)


def _load_files(kind: str, paths: Sequence[str], *, streaming: bool) -> list[Split]:
    """Load files of one split, those with the same names of classes at once: `datasets` reads names of one file."""
    parts: list[Split] = []
    for _, group in groupby(paths, _class_lists if kind == "parquet" else lambda path: kind):
        files = {"train": [glob.escape(path) for path in group]}
        parts.append(load_dataset(kind, data_files=files, split="train", streaming=streaming))
    return parts


def _class_lists(path: str) -> dict[str, list[str]]:
    """Return the names of the classes in each column of a parquet file that has any."""
    features = Features.from_arrow_schema(pq.read_schema(path))
    return {name: list(kind.names) for name, kind in features.items() if isinstance(kind, ClassLabel)}


def _files_of_splits(folder: Path, ending: str, recipe: DataRecipe) -> dict[str, list[str]]:
    """Sort files by split: the wanted split that their folder or a word of their name mentions, or the first word."""
    files: dict[str, list[str]] = {}
    for path in sorted([*folder.glob(f"*.{ending}"), *folder.glob(f"*/*.{ending}")]):
        words = [_split_name(word) for word in (path.parent.name, *re.split(r"[-.]", path.name))]
        known = [word for word in words if word in (recipe.train_split, recipe.eval_split)]
        files.setdefault((known or words[1:])[0], []).append(str(path))
    return files


def _name_by_list(splits: Mapping[str, list[Split]], names: list[str], recipe: DataRecipe) -> dict[str, list[Split]]:
    """Name the classes of integer labels by the lines of `classes.txt`, if there are any."""
    return {
        name: [_named(part, name, names, recipe) if names else part for part in parts]
        for name, parts in splits.items()
    }


def _named(part: Split, place: str, names: list[str], recipe: DataRecipe) -> Split:
    column = find_column(part, "label_column", recipe)
    feature = part.features.get(column)
    if isinstance(feature, ClassLabel) or "int" not in getattr(feature, "dtype", ""):
        return part
    if isinstance(part, Dataset):
        numbers = read_labels(part, column)
        if numbers.min() < 0 or numbers.max() >= len(names):
            raise DatasetError(
                f"data.dataset: classes.txt names {len(names)} classes, but the labels of split {place!r} range from "
                f"{numbers.min()} to {numbers.max()}; add the missing names"
            )
    return part.cast_column(column, ClassLabel(names=names))


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


def _in_memory(splits: Mapping[str, Dataset], *, streaming: bool) -> Opened:
    return Opened({name: [split.to_iterable_dataset() if streaming else split] for name, split in splits.items()})


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
