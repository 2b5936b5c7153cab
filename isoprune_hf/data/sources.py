"""Where labelled images come from: the splits of a data set as it is stored, on the Hub, in files or in a package."""

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from tarfile import TarError
from typing import Any

import numpy as np
import pyarrow as pa
from datasets import ClassLabel, Dataset, Features, Image, IterableDataset, load_dataset, load_from_disk
from datasets.exceptions import DatasetsError
from datasets.packaged_modules.webdataset.webdataset import WebDataset
from PIL import Image as PILImage

from isoprune_hf.errors import DatasetError
from isoprune_hf.extras import naming_extra
from isoprune_hf.recipes import DataRecipe

_KINDS = "give `digits`, a folder of parquet or tar files, a folder with train/CLASS and val/CLASS, or a Hub id"
# What the columns are named in tar files, by WebDataset's convention.
_IN_TARS = {"image_column": ("jpg", "jpeg", "png", "webp"), "label_column": ("cls",)}


@contextmanager
def only_labels_decoded() -> Iterator[None]:
    """Let `datasets` read numbers from tar files, and leave all else as bytes, pickles among them."""
    decoders = WebDataset.DECODERS
    WebDataset.DECODERS = {ending: decoder for ending, decoder in decoders.items() if decoder is int}
    try:
        yield
    finally:
        WebDataset.DECODERS = decoders


def open_splits(recipe: DataRecipe) -> dict[str, Dataset | IterableDataset]:
    """Open those of the two splits that the data set has; with `streaming`, that for training is a stream.

    Raises:
        DatasetError: It is not there, or has neither split.
    """
    with only_labels_decoded():
        if not recipe.streaming:
            return _open(recipe, (recipe.train_split, recipe.eval_split))
        streams = _open(recipe, (recipe.train_split, recipe.eval_split), streaming=True)
        whole = _open(recipe, (recipe.eval_split,)) if recipe.eval_split in streams else {}
        return {name: stream._resolve_features() for name, stream in streams.items()} | whole


def _open(
    recipe: DataRecipe, wanted: tuple[str, ...], *, streaming: bool = False
) -> dict[str, Dataset | IterableDataset]:
    if not recipe.dataset:
        raise DatasetError(f"data.dataset is not set; {_KINDS}")
    if recipe.dataset == "digits":
        return _in_memory(_asked(_load_digits(), recipe, wanted), streaming)
    folder = Path(recipe.dataset).expanduser()
    try:
        if not folder.is_dir():
            # One split alone where the other one is a stream, so that only it is fetched.
            named = {"split": {wanted[0]: wanted[0]}} if len(wanted) == 1 else {}
            opened = load_dataset(recipe.dataset, revision=recipe.revision, streaming=streaming, **named)
            return _asked(opened, recipe, wanted)
        if (folder / "dataset_dict.json").is_file():
            return _in_memory(_asked(load_from_disk(str(folder)), recipe, wanted), streaming)
        for kind, ending in (("parquet", "parquet"), ("webdataset", "tar")):
            files = _files_of_splits(folder, ending, recipe)
            if files:
                opened = dict(load_dataset(kind, data_files=_asked(files, recipe, wanted), streaming=streaming))
                return _name_by_list(opened, folder / "classes.txt", recipe)
        folders = {_split_name(path.name): path for path in sorted(folder.iterdir()) if any(path.glob("*/*"))}
        if not folders:
            raise DatasetError(
                f"data.dataset: the folder {str(folder)!r} has no parquet, no tar files and no split folders; {_KINDS}"
            )
        # One split at a time: opened together, `datasets` would merge the class names of all splits.
        return {name: _load_image_folder(path, streaming) for name, path in _asked(folders, recipe, wanted).items()}
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
        column = find_column(split, "label_column", recipe)
        feature = split.features.get(column)
        is_bare = names and not isinstance(feature, ClassLabel) and "int" in getattr(feature, "dtype", "")
        if is_bare and isinstance(split, Dataset):
            numbers = read_labels(split, column)
            if numbers.min() < 0 or numbers.max() >= len(names):
                raise DatasetError(
                    f"data.dataset: {file} names {len(names)} classes, the labels of split {name!r} go from "
                    f"{numbers.min()} to {numbers.max()}"
                )
        named[name] = split.cast_column(column, ClassLabel(names=names)) if is_bare else split
    return named


def find_column(split: Dataset, setting: str, recipe: DataRecipe) -> str:
    """Name the column that a setting means; where it is left as it is, WebDataset's names do, too."""
    asked = getattr(recipe, setting)
    others = _IN_TARS[setting] if asked == getattr(DataRecipe, setting) else ()
    return next((name for name in (asked, *others) if name in split.features), asked)


def _split_name(name: str) -> str:
    return "validation" if name == "val" else name


def _asked(available: Mapping[str, Any], recipe: DataRecipe, wanted: tuple[str, ...]) -> dict[str, Any]:
    found = {name: available[name] for name in wanted if name in available}
    if not found:
        raise DatasetError(
            f"data.dataset: {recipe.dataset!r} has neither the split {recipe.train_split!r} nor "
            f"{recipe.eval_split!r}, it has {', '.join(map(str, available))}; set data.train_split and data.eval_split"
        )
    return found


def _in_memory(splits: dict[str, Dataset], streaming: bool) -> dict[str, Dataset | IterableDataset]:
    return {name: split.to_iterable_dataset() for name, split in splits.items()} if streaming else splits


def _load_image_folder(folder: Path, streaming: bool) -> Dataset | IterableDataset:
    options = {"data_files": {"train": "*/*"}, "drop_labels": False, "split": "train", "streaming": streaming}
    return load_dataset("imagefolder", data_dir=str(folder), **options)


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
    return column.cast(pa.int64()).fill_null(-1).to_numpy()
