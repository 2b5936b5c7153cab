"""Read CSV and JSON-lines files that name one image in each row; call `read_table`."""

import csv
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
from datasets import Dataset, Features, Image, List, Value

from isoprune_hf.data.columns import BOX, is_label_name, is_mask_name
from isoprune_hf.errors import DatasetError
from isoprune_hf.recipes import DataRecipe

ENDINGS = ("csv", "jsonl")
_PATHS = "file_name"  # the column of paths that `datasets` reads, and the end of the names of others
_TYPES: dict[type, str] = {int: "int64", str: "string"}


def read_table(file: Path, recipe: DataRecipe) -> Dataset:
    """Return the rows of a file with its columns: images, whole numbers, text, lists of them, and boxes of JSONL.

    Lists in cells of CSV are written as in JSON. Other columns are left out. Paths of images are relative to the
    folder of the file. Without a column `data.image_column`, the one whose first row is the path of a file has the
    images; of several, `file_name`, or the only one that has no name of masks. The others with such a name are masks.

    Raises:
        DatasetError: It has no rows, no column or several columns with paths, a list of labels is not one of JSON, or
            boxes are of several types.
    """
    columns = _read_lines(file) if file.suffix.lower() == ".jsonl" else _read_csv(file, recipe)
    paths = [name for name, cells in columns.items() if _is_place(cells[0], file.parent)]
    masks = {name: _name_of_masks(name) for name in paths if is_mask_name(_name_of_masks(name), recipe)}
    others = paths if len(paths) == 1 else [name for name in paths if name not in masks]
    named = [name for name, known in ((recipe.image_column, columns), (_PATHS, others)) if name in known]
    image = named[0] if named else others[0] if len(others) == 1 else None
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
            values[name], features[name] = [str(file.parent / str(cell)) for cell in cells], Image()
        elif name in masks:
            values[masks[name]] = [None if cell in (None, "") else str(file.parent / str(cell)) for cell in cells]
            features[masks[name]] = Image()
        elif (feature := _type_of(cells) or _type_of_objects(name, cells)) is not None:
            values[name], features[name] = cells, feature
    return Dataset.from_dict(values, features=Features(features))


def _read_csv(file: Path, recipe: DataRecipe) -> dict[str, list[Any]]:
    with file.open(newline="", encoding="utf-8-sig") as text:
        rows = list(csv.reader(text))
    if len(rows) < 2 or any(len(row) != len(rows[0]) for row in rows):
        raise DatasetError(f"data.dataset: {str(file)!r} needs a line of column names, and rows of as many columns")
    columns = dict(zip(rows[0], map(list, zip(*rows[1:], strict=True)), strict=True))
    return {name: _read_cells(name, cells, file, recipe) for name, cells in columns.items()}


def _read_cells(name: str, cells: list[str], file: Path, recipe: DataRecipe) -> list[Any]:
    """Return the cells of a column of CSV as numbers or lists if all of them are, else as text."""
    if all(map(str.isdecimal, cells)):
        return [*map(int, cells)]
    if not any(cells) or not all(cell.startswith("[") for cell in cells if cell):
        return cells
    try:
        return [json.loads(cell) if cell else None for cell in cells]
    except ValueError as error:
        if not is_label_name(name, recipe):
            return cells
        raise DatasetError(
            f"data.label_column: column {name!r} of {str(file)!r} has lists that are not written as in JSON, such as "
            f'{next(filter(None, cells))!r:.99}; write ["cat", "dog"] or [0, 3]'
        ) from error


def _read_lines(file: Path) -> dict[str, list[Any]]:
    try:
        rows = [json.loads(line) for line in file.read_text(encoding="utf-8-sig").splitlines() if line.strip()]
    except ValueError as error:
        raise DatasetError(f"data.dataset: {str(file)!r} is not JSON lines ({error})") from error
    if not rows or not all(isinstance(row, dict) for row in rows):
        raise DatasetError(f"data.dataset: {str(file)!r} needs a JSON object in each line, with the path of an image")
    return {name: [row.get(name) for row in rows] for name in rows[0]}


def _name_of_masks(name: str) -> str:
    """Return the name of a column of images whose paths are in another one, as `datasets` gives it."""
    return name.removesuffix(f"_{_PATHS}")


def _is_place(cell: Any, folder: Path) -> bool:
    return isinstance(cell, str) and bool(cell) and (folder / cell).is_file()


def _type_of_objects(name: str, cells: list[Any]) -> Any:
    """Return the type of a column of boxes with their categories; None for another one."""
    known = [cell[0] if isinstance(cell, list) and cell else cell for cell in cells]
    if not any(isinstance(cell, dict) and BOX in cell for cell in known):
        return None
    try:
        return Features.from_arrow_schema(pa.schema({name: pa.array(cells).type}))[name]
    except pa.ArrowException as error:
        reason = " ".join(str(error).split())
        raise DatasetError(f"data: the values in column {name!r} are of several types ({reason})") from error


def _type_of(cells: list[Any]) -> Value | List | None:
    """Return the type of a column of numbers, of text, or of lists of them; None for another one."""
    known = [cell for cell in cells if cell is not None]
    in_lists = bool(known) and all(isinstance(cell, list) for cell in known)
    entries = {type(entry) for cell in known for entry in (cell if in_lists else [cell])}
    if not in_lists and len(entries) != 1:
        return None
    kind = _TYPES.get(next(iter(entries), str))
    if kind is None or len(entries) > 1:
        return None
    return List(Value(kind)) if in_lists else Value(kind)
