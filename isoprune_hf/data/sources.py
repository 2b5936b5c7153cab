"""Open the splits of a data set from the Hub, from files, or from a package; call `open_splits`."""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from tarfile import TarError

import numpy as np
from datasets import ClassLabel, Dataset, Features, Image, IterableDataset, load_dataset, load_from_disk
from datasets.exceptions import DatasetsError
from PIL import Image as PILImage

from isoprune_hf.data.archives import unpack
from isoprune_hf.data.columns import NamedColumn, named_column
from isoprune_hf.data.datasets_internals import only_labels_decoded, with_known_features
from isoprune_hf.data.files import KINDS, load_files, name_by_list, sort_by_split
from isoprune_hf.data.image_folders import class_folders, holds_images, read_class_folders
from isoprune_hf.data.label_columns import Split
from isoprune_hf.data.splits import UNDIVIDED, ChosenSplits, choose_splits, is_split_name
from isoprune_hf.data.tables import ENDINGS, read_table
from isoprune_hf.data.unlabelled import read_flat_folder, with_label_column
from isoprune_hf.errors import DatasetError
from isoprune_hf.extras import naming_extra
from isoprune_hf.recipes import DataRecipe
from isoprune_hf.terminal import suggest

_PLACES = (
    "set `digits`, a folder of parquet or tar files, a folder with train/CLASS and val/CLASS, or the id of a Hub "
    "data set"
)
_SHARDS = 64  # of a stream of files; ranks share them


@dataclass(frozen=True)
class Opened:
    """The splits of a data set that a recipe means, as they lie in its files.

    Args:
        splits: Parts by the name of the split; each part has columns and names of classes of its own.
        chosen: Names of the splits.
        is_sorted: The order of the classes is that of their sorted names, which nothing else declares.
        named: The column that the recipe names as that of the labels; None with the default.
    """

    splits: dict[str, list[Split]]
    chosen: ChosenSplits
    is_sorted: bool
    named: NamedColumn | None


@dataclass(frozen=True)
class _Available:
    """Functions that load the parts of each split of a data set; `is_sorted` as in `Opened`.

    `names` are the lines of `classes.txt`.
    """

    splits: Mapping[str, Callable[[], list[Split]]]
    is_sorted: bool = False
    names: tuple[str, ...] = ()


def open_splits(recipe: DataRecipe) -> Opened:
    """Open the training and the evaluation split, or the one that exists; with `streaming`, the former as a stream.

    Raises:
        DatasetError: The data set cannot be opened, or has neither split.
    """
    if not recipe.dataset:
        raise DatasetError(f"data.dataset is not set; {_PLACES}")
    try:
        with only_labels_decoded():
            return _load_chosen(recipe)
    except DatasetError:
        raise
    except (DatasetsError, TarError, OSError, ValueError, RuntimeError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        near = suggest(recipe.dataset, ["digits", *map(str, Path(recipe.dataset).parent.glob("*"))], limit=1)
        raise DatasetError(f"data.dataset: {recipe.dataset!r} cannot be opened ({reason}); {_PLACES}{near}") from error


def _load_chosen(recipe: DataRecipe) -> Opened:
    available = _find(recipe, streaming=recipe.streaming)
    chosen = choose_splits([*available.splits], recipe)
    names = dict.fromkeys(name for name in (chosen.train, chosen.evaluation) if name is not None)
    splits: dict[str, list[Split]] = {}
    for name in names:
        if recipe.streaming and name == chosen.evaluation:
            splits[name] = _find(recipe, streaming=False, only=name).splits[name]()
        else:
            loaded = available.splits[name]()
            splits[name] = [
                with_known_features(part) if isinstance(part, IterableDataset) else part for part in loaded
            ]
    named = named_column([part for parts in splits.values() for part in parts], recipe)
    labelled = {
        name: [name_by_list(part, name, available.names, recipe) for part in parts]
        for name, parts in with_label_column(splits, recipe).items()
    }
    return Opened(labelled, chosen, available.is_sorted, named)


def _find(recipe: DataRecipe, *, streaming: bool, only: str | None = None) -> _Available:
    """Find the splits of a data set; of one on the Hub, `only` fetches a single one."""
    if recipe.dataset == "digits":
        return _in_memory(_load_digits(), streaming=streaming)
    place = Path(str(recipe.dataset)).expanduser()
    if place.is_dir():
        return _find_in_folder(place, recipe, streaming=streaming)
    if place.is_file():
        return _find_in_file(place, recipe, streaming=streaming)
    split = None if only is None else {only: only}
    try:
        opened = load_dataset(
            recipe.dataset, recipe.subset, revision=recipe.revision, streaming=streaming, split=split
        )
    except ValueError as error:  # `datasets` has no type of its own for a missing or unknown subset
        known = re.search(r"\[.*\]", str(error), re.DOTALL)
        if not known or "onfig" not in str(error):
            raise
        raise DatasetError(
            f"data.subset: {recipe.dataset!r} has several subsets, {known[0]}; choose one with --data.subset, got "
            f"{recipe.subset!r}"
        ) from error
    return _Available({name: partial(list, [part]) for name, part in opened.items()})


def _find_in_file(file: Path, recipe: DataRecipe, *, streaming: bool) -> _Available:
    ending = file.suffix.lower()[1:]
    if ending in ENDINGS:
        return _in_memory({UNDIVIDED: read_table(file, recipe)}, streaming=streaming, is_sorted=True)
    if ending == "zip":
        return _find_in_folder(unpack(file), recipe, streaming=streaming)
    if ending not in KINDS:
        raise DatasetError(
            f"data.dataset: {str(file)!r} is no parquet, tar, CSV, JSONL or zip file; unpack another archive, and "
            "give its folder"
        )
    return _Available({UNDIVIDED: partial(load_files, KINDS[ending], [str(file)], streaming=streaming)})


def _find_in_folder(folder: Path, recipe: DataRecipe, *, streaming: bool) -> _Available:
    file = folder / "classes.txt"
    names = tuple(file.read_text(encoding="utf-8").splitlines()) if file.is_file() else ()
    return replace(_find_unnamed(folder, recipe, names, streaming=streaming), names=names)


def _find_unnamed(folder: Path, recipe: DataRecipe, names: tuple[str, ...], *, streaming: bool) -> _Available:
    """Find the splits of a folder; integer labels have no names yet, and class folders have the order of `names`."""
    if (folder / "dataset_dict.json").is_file():
        return _in_memory(load_from_disk(str(folder)), streaming=streaming)
    if (folder / "state.json").is_file():
        return _in_memory({UNDIVIDED: load_from_disk(str(folder))}, streaming=streaming)
    for ending, kind in KINDS.items():
        files = sort_by_split(folder, ending, recipe)
        if files:
            return _Available(
                {name: partial(load_files, kind, paths, streaming=streaming) for name, paths in files.items()}
            )
    return _find_images(folder, recipe, names, streaming=streaming)


def _find_images(folder: Path, recipe: DataRecipe, names: tuple[str, ...], *, streaming: bool) -> _Available:
    """Find folders of classes, below folders of splits or directly in the folder, or else CSV or JSONL files.

    Files named metadata come first, as for `datasets`. Otherwise images without labels, in folders of splits or
    directly in the folder.
    """
    described = _find_tables(folder, recipe, stem="metadata")
    if described:
        return _in_memory(described, streaming=streaming, is_sorted=not names)
    children = class_folders(folder)
    divided = {path.name: path for path in children if any(map(holds_images, class_folders(path)))}
    flat = {path.name: path for path in children if holds_images(path, depth=1)}
    if not divided and flat and all(is_split_name(name, recipe) for name in flat):
        return _in_memory({name: read_flat_folder(path) for name, path in flat.items()}, streaming=streaming)
    if not any(is_split_name(name, recipe) for name in divided):
        divided = {UNDIVIDED: folder} if flat else divided
    if divided:
        loaders = {name: partial(_load_images, path, names, streaming=streaming) for name, path in divided.items()}
        return _Available(loaders, is_sorted=not names)
    read = _find_tables(folder, recipe)
    if not read and holds_images(folder, depth=1):
        return _in_memory({UNDIVIDED: read_flat_folder(folder)}, streaming=streaming)
    if not read:
        raise DatasetError(
            f"data.dataset: the folder {str(folder)!r} has no parquet, no tar files and no split folders; {_PLACES}"
        )
    return _in_memory(read, streaming=streaming, is_sorted=not names)


def _find_tables(folder: Path, recipe: DataRecipe, stem: str = "*") -> dict[str, Dataset]:
    """Read the CSV or JSONL file of each split."""
    found = [sort_by_split(folder, ending, recipe, stem) for ending in ENDINGS]
    return {name: read_table(Path(paths[0]), recipe) for files in found for name, paths in files.items()}


def _load_images(folder: Path, names: tuple[str, ...], *, streaming: bool) -> list[Split]:
    images = read_class_folders(folder, names)
    return [_in_shards(images) if streaming else images]


def _in_shards(images: Dataset) -> IterableDataset:
    """Return files that are sorted by class as a stream in a fixed random order: a stream is only shuffled locally."""
    shuffled = images.select(np.random.default_rng(0).permutation(len(images))).flatten_indices(keep_in_memory=True)
    return shuffled.to_iterable_dataset(num_shards=min(len(images), _SHARDS))


def _in_memory(splits: Mapping[str, Dataset], *, streaming: bool, is_sorted: bool = False) -> _Available:
    parts = {name: split.to_iterable_dataset() if streaming else split for name, split in splits.items()}
    return _Available({name: partial(list, [part]) for name, part in parts.items()}, is_sorted)


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
