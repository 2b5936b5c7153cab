"""Columns that annotate images for another task than classification: `divide_annotations`."""

from datasets import Dataset

from isoprune_hf.data.decoding import Rows


def divide_annotations(split: Rows, column: str) -> tuple[Rows, Dataset | None]:
    """Return a split with its images and labels alone, and one with a column of annotations; None if it has none.

    Args:
        split: Rows with the columns `image` and `label`, and those of annotations.
        column: `MASK` or `OBJECTS` of `columns`.
    """
    if not isinstance(split, Dataset):
        return split, None
    annotations = split.select_columns(column) if column in split.column_names else None
    return split.select_columns(["image", "label"]), annotations
