"""Boxes of objects with their categories, in the column `OBJECTS` of a split: `ObjectReader`, `original_size`."""

import io
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from datasets import ClassLabel, Dataset
from PIL import ExifTags, Image
from torch import Tensor
from torchvision.ops import box_convert

from isoprune_hf.data.class_names import shorten
from isoprune_hf.data.columns import BOX, OBJECTS, object_fields
from isoprune_hf.data.decoding import Decoding, Rows, read_image, to_pixels
from isoprune_hf.data.labels import place_names
from isoprune_hf.errors import DatasetError
from isoprune_hf.limits import MAX_IMAGE_BYTES
from isoprune_hf.plain_files import read_bytes

_CATEGORIES = ("category", "categories")
_CROWD = "iscrowd"
_SLACK = 1.0  # pixels by which a box may reach out of its image: corners are rounded
_TURNED = (5, 6, 7, 8)  # orientations of EXIF that exchange height and width


class Objects(NamedTuple):
    """The objects of an image.

    Args:
        boxes: Corners in pixels of the original image, (N, 4) in float32.
        classes: Classes of the model, (N,) in int64.
        is_crowd: Whether a box has many objects, which are not counted one by one, (N,).
    """

    boxes: Tensor
    classes: Tensor
    is_crowd: Tensor


class ObjectReader:
    """Reads the objects of each image of a split; their categories become the classes of a model by their names.

    Categories are class labels, text, or whole numbers, which are those of the classes.

    Args:
        rows: Rows with the column `OBJECTS`.
        id2label: Names of the classes of the model.

    Raises:
        DatasetError: The objects have no categories, or one that is no class of the model.
    """

    def __init__(self, rows: Dataset, id2label: Mapping[int, str]):
        self._rows = rows.with_format(None)
        fields = object_fields(rows.features[OBJECTS])
        named = [name for name in _CATEGORIES if name in fields]
        if not named:
            raise DatasetError(
                f"data: the objects of the images have the fields {', '.join(fields)}, and no category; name the "
                "class of each box in the field category, or leave the column out"
            )
        self._category = named[0]
        self._class_of = self._classes(fields[self._category], [id2label[index] for index in range(len(id2label))])

    def __len__(self) -> int:
        return len(self._rows)

    def read(self, place: int, size: tuple[int, int] | None = None) -> Objects:
        """Return the objects of an image.

        Args:
            place: Its position.
            size: Height and width of the original image; the boxes must lie in it.

        Raises:
            DatasetError: A box is none, or lies outside, or has no category, or one that the model does not know.
        """
        where = f"data: the objects of image {place} of its split"
        found = _in_lists(self._rows[place][OBJECTS], where)
        boxes, categories = found.get(BOX) or [], found.get(self._category) or []
        if len(boxes) != len(categories):
            raise DatasetError(f"{where} are {len(boxes)} boxes with {len(categories)} categories; each box has one")
        for box in boxes:
            _check_box(box, size, where)
        classes = [self._class_of(category) for category in categories]
        if None in classes:
            unknown = categories[classes.index(None)]
            raise DatasetError(f"{where} have the category {unknown!r}, which is no class of the model")
        corners = box_convert(torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4), "xywh", "xyxy")
        crowds = torch.tensor([bool(flag) for flag in found.get(_CROWD) or [0] * len(boxes)], dtype=torch.bool)
        return Objects(corners, torch.tensor(classes, dtype=torch.int64), crowds)

    def _classes(self, feature: Any, names: list[str]) -> Callable[[Any], int | None]:
        """Return a function from a category to a class of the model; None for one that it does not have."""
        if not isinstance(feature, ClassLabel) and "string" not in getattr(feature, "dtype", ""):
            return lambda category: category if category is not None and 0 <= category < len(names) else None
        known = feature.names if isinstance(feature, ClassLabel) else self._texts()
        places = place_names(known, names, is_numbered=isinstance(feature, ClassLabel))
        if places is None:
            raise DatasetError(
                f"data: the categories of the boxes ({shorten(known)}) are not all among the classes of the model "
                f"({shorten(names)}); rename them, or leave the column of the boxes out"
            )
        keys: list[Any] = list(range(len(known))) if isinstance(feature, ClassLabel) else known
        return dict(zip(keys, places, strict=True)).get

    def _texts(self) -> list[str]:
        """Return the texts of all categories, sorted."""
        rows = (_in_lists(row[OBJECTS], "data: the objects of an image") for row in self._rows)
        return sorted({text for row in rows for text in row.get(self._category) or () if text is not None})


def original_size(rows: Rows, place: int, decoding: Decoding) -> tuple[int, int]:
    """Return height and width of an image as it is read, before any resize; of a file, the header tells them.

    Args:
        rows: Rows with encoded images, or arrays.
        place: Position of an image that can be read.
        decoding: How images are read.
    """
    image = rows[place]["image"]
    if not isinstance(image, dict):
        height, width = to_pixels(read_image(rows, place, decoding).image).shape[-2:]
        return int(height), int(width)
    encoded = read_bytes(image["path"], MAX_IMAGE_BYTES) if image["bytes"] is None else image["bytes"]
    with Image.open(io.BytesIO(encoded)) as opened:
        is_turned = decoding.exif and opened.getexif().get(ExifTags.Base.Orientation, 1) in _TURNED
        width, height = reversed(opened.size) if is_turned else opened.size
    return height, width


def _in_lists(stored: Any, where: str) -> Mapping[str, Any]:
    """Return the objects of an image as lists by the names of their fields."""
    if stored is None:
        raise DatasetError(f"{where} are missing; an image without objects has empty lists")
    if isinstance(stored, Mapping):
        return stored
    return {name: [each[name] for each in stored] for name in (stored[0] if stored else ())}


def _check_box(box: Any, size: tuple[int, int] | None, where: str) -> None:
    """Check that a box is [x, y, width, height] in the pixels of an image of a size."""
    form = "boxes are [x, y, width, height] in pixels of the original image"
    if box is None or len(box) != 4 or not all(value is not None and abs(value) < float("inf") for value in box):
        raise DatasetError(f"{where} have the box {box!r:.99}; {form}")
    left, top, width, height = box
    if width < 0 or height < 0:
        raise DatasetError(f"{where} have the box {box} of negative width or height; {form}")
    if size is None:
        return
    is_inside = left >= -_SLACK and top >= -_SLACK
    is_inside = is_inside and left + width <= size[1] + _SLACK and top + height <= size[0] + _SLACK
    if not is_inside:
        raise DatasetError(
            f"{where} have the box {box}, which reaches out of the image, {size[1]} pixels wide and {size[0]} high; "
            f"{form}"
        )
