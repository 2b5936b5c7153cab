"""Parquet and tar files of a folder: `sort_by_split` finds those of each split, `load_files` loads them."""

import glob
import re
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path

import pyarrow.parquet as pq
from datasets import ClassLabel, Dataset, Features, load_dataset

from isoprune_hf.data.columns import find_column
from isoprune_hf.data.label_columns import Split, class_feature, is_list, label_kind, read_all_labels
from isoprune_hf.data.splits import is_split_name
from isoprune_hf.errors import DatasetError
from isoprune_hf.recipes import DataRecipe

KINDS = {"parquet": "parquet", "tar": "webdataset"}  # ending of the files: their name in `datasets`


def sort_by_split(folder: Path, ending: str, recipe: DataRecipe, stem: str = "*") -> dict[str, list[str]]:
    """Sort files by the split that a folder or a word of their name mentions, or else by the first word.

    Names are lower-case. Files with one first word, and without a split, are one split. Pipes are left out, and so are
    files of another name than `stem`, if it is given.
    """
    files: dict[str, list[str]] = {}
    for path in sorted([*folder.glob(f"{stem}.{ending}"), *folder.glob(f"*/{stem}.{ending}")]):
        if path.exists() and not path.is_file():  # a pipe, which `datasets` would wait for
            continue
        words = [*path.relative_to(folder).parts[:-1], *re.split(r"[-_.]", path.name)]
        known = [word for word in words if is_split_name(word, recipe)]
        first = re.split(r"[-.]", path.name)[0]
        files.setdefault((known or [first])[0].casefold(), []).append(str(path))
    return files


def load_files(kind: str, paths: Sequence[str], *, streaming: bool) -> list[Split]:
    """Load files of one split, those with the same names of classes at once: `datasets` reads names of one file.

    Raises:
        DatasetError: A path has two colons, which `datasets` reads as two places.
    """
    if "::" in paths[0]:
        raise DatasetError(f"data.dataset: the path {paths[0]!r} has '::', which `datasets` cannot read; rename it")
    parts: list[Split] = []
    for _, group in groupby(paths, _class_lists if kind == "parquet" else lambda path: kind):
        files = {"train": [glob.escape(path) for path in group]}
        parts.append(load_dataset(kind, data_files=files, split="train", streaming=streaming))
    return parts


def _class_lists(path: str) -> dict[str, list[str]]:
    """Return the names of the classes in each column of a parquet file that has any."""
    features = Features.from_arrow_schema(pq.read_schema(path))
    kinds = {name: label_kind(feature) for name, feature in features.items()}
    return {name: list(kind.names) for name, kind in kinds.items() if isinstance(kind, ClassLabel)}


def name_by_list(part: Split, place: str, names: Sequence[str], recipe: DataRecipe) -> Split:
    """Return a part of a split whose integer labels have the lines of `classes.txt` as names, if there are any.

    Args:
        part: Rows with a column of labels, which may be that of `unlabelled`.
        place: Name of the split.
        names: Lines of the file.
        recipe: Names the column.

    Raises:
        DatasetError: A label has no name, or there is no column of labels.
    """
    if not names:
        return part
    column = find_column(part, "label_column", recipe, place)
    feature = part.features[column]
    kind = label_kind(feature)
    if isinstance(kind, ClassLabel) or "int" not in getattr(kind, "dtype", ""):
        return part
    if isinstance(part, Dataset):
        numbers = read_all_labels(part, column)
        if len(numbers) and (numbers.min() < 0 or numbers.max() >= len(names)):
            raise DatasetError(
                f"data.dataset: classes.txt names {len(names)} classes, but the labels of split {place!r} range from "
                f"{numbers.min()} to {numbers.max()}; add the missing names"
            )
    return part.cast_column(column, class_feature(names, in_lists=is_list(feature)))
