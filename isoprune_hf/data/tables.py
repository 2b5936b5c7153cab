"""Read CSV files that name one image in each row; call `read_table`."""

import csv
from pathlib import Path
from typing import Any

from datasets import Dataset, Features, Image, Value

from isoprune_hf.errors import DatasetError
from isoprune_hf.recipes import DataRecipe


def read_table(file: Path, recipe: DataRecipe) -> Dataset:
    """Return the rows of a CSV file with its columns: images, whole numbers and text.

    Paths of images are relative to the folder of the file. Without a column `data.image_column`, the one whose first
    row is the path of a file has the images.

    Raises:
        DatasetError: It has no rows, or no column or several columns with paths.
    """
    with file.open(newline="", encoding="utf-8-sig") as text:
        rows = list(csv.reader(text))
    if len(rows) < 2 or any(len(row) != len(rows[0]) for row in rows):
        raise DatasetError(f"data.dataset: {str(file)!r} needs a line of column names, and rows of as many columns")
    columns = dict(zip(rows[0], map(list, zip(*rows[1:], strict=True)), strict=True))
    paths = [name for name, cells in columns.items() if cells[0] and (file.parent / cells[0]).is_file()]
    image = recipe.image_column if recipe.image_column in columns else paths[0] if len(paths) == 1 else None
    if image is None:
        raise DatasetError(
            f"data.image_column: {str(file)!r} needs one column with the paths of existing images, from the folder of "
            f"the file on; found {', '.join(paths) or 'none'} of {', '.join(columns)}; choose it with "
            "--data.image_column"
        )
    values: dict[str, list[Any]] = {}
    features: dict[str, Any] = {}
    for name, cells in columns.items():
        if name == image:
            values[name], features[name] = [str(file.parent / cell) for cell in cells], Image()
        elif all(map(str.isdecimal, cells)):
            values[name], features[name] = [*map(int, cells)], Value("int64")
        else:
            values[name], features[name] = cells, Value("string")
    return Dataset.from_dict(values, features=Features(features))
