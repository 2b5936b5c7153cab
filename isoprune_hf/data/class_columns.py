"""Name the classes in the label columns of all splits of a data set alike; call `name_classes`."""

from collections.abc import Mapping, Sequence

import numpy as np
from datasets import ClassLabel, Dataset, concatenate_datasets

from isoprune_hf.data.class_names import number_texts, shorten, unite_classes
from isoprune_hf.data.label_columns import (
    Split,
    class_feature,
    count_unlabelled,
    is_list,
    label_kind,
    read_all_labels,
    read_label_lists,
)
from isoprune_hf.errors import DatasetError
from isoprune_hf.recipes import DataRecipe


def name_classes(
    splits: Mapping[str, Sequence[Split]], recipe: DataRecipe
) -> tuple[dict[str, Split], tuple[str, ...]]:
    """Make every label column a ClassLabel, or lists of one, with the same names, and join the parts of each split.

    Args:
        splits: Split -> its parts, with the columns `image` and `label`.
        recipe: Names the columns in errors.

    Returns:
        The splits, and the names.

    Raises:
        DatasetError: A column has neither class labels, nor text, nor the whole numbers 0 to n-1, nor lists of them;
            parts have other classes; or an image has no label.
    """
    where = f"data.label_column: column {recipe.label_column!r} of {recipe.dataset!r}"
    places = [name for name, parts in splits.items() for _ in parts]
    parts = [part for parts in splits.values() for part in parts]
    united, names = unite_classes(_as_classes(parts, where), places, where)
    for name, part in zip(places, united, strict=True):
        if not isinstance(part, Dataset):
            continue  # a stream is checked row by row
        unlabelled = count_unlabelled(part, len(names))
        if unlabelled:
            raise DatasetError(
                f"{where}: {unlabelled} of {len(part)} images of split {name!r} have no label; choose another split"
            )
    rest = iter(united)
    joined = {name: [next(rest) for _ in parts] for name, parts in splits.items()}
    return {
        name: found[0] if len(found) == 1 else concatenate_datasets(found) for name, found in joined.items()
    }, names


def _as_classes(parts: Sequence[Split], where: str) -> list[Split]:
    """Turn label columns with text, or with the whole numbers 0 to n-1, into a ClassLabel with these names.

    So become the entries of lists of them.
    """
    in_lists = is_list(parts[0].features["label"])
    if any(is_list(part.features["label"]) != in_lists for part in parts):
        raise DatasetError(f"{where} has one class for each image of some files and lists of classes in others")
    kinds = [label_kind(part.features["label"]) for part in parts]
    if all(isinstance(kind, ClassLabel) for kind in kinds):
        return list(parts)
    are_texts = all(getattr(kind, "dtype", "") in ("string", "large_string") for kind in kinds)
    must = f"{where} must contain class labels, text or the whole numbers 0 to n-1{', or lists of them' * in_lists}"
    for kind in kinds:
        if not are_texts and not isinstance(kind, ClassLabel) and "int" not in getattr(kind, "dtype", ""):
            raise DatasetError(f"{must}, got {kind}")
    known = [part for part in parts if isinstance(part, Dataset)]
    if not known or (are_texts and len(known) < len(parts)):
        raise DatasetError(
            f"{where} contains {'text' if are_texts else 'numbers'}, and the number of classes of a stream is "
            "unknown; name the classes, or add an evaluation split"
        )
    if are_texts:
        return number_texts(known, where)
    if in_lists:
        _check_no_indicators(known, where)
    numbers = np.unique(np.concatenate([*map(read_all_labels, known)])).tolist()
    if numbers != list(range(len(numbers))):
        raise DatasetError(f"{must}, got {shorten(numbers)}")
    feature = class_feature([str(number) for number in numbers], in_lists=in_lists)
    return [part.cast_column("label", feature) for part in parts]


def _check_no_indicators(parts: Sequence[Dataset], where: str) -> None:
    """Check that lists of numbers are those of classes, not a zero or one for each class.

    Raises:
        DatasetError: A list has a number twice.
    """
    for part in parts:
        for labels in read_label_lists(part):
            if labels is not None and len({*labels}) < len(labels):
                raise DatasetError(
                    f"{where} has a number twice in one list, {shorten(labels)}; lists of numbers name the classes of "
                    "an image: write the places of the ones of a list of zeros and ones"
                )
