"""Boxes of objects are found by their column, checked, and numbered as the classes of a model."""

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from datasets import ClassLabel, Dataset, Features, Image, List, Value
from PIL import Image as PILImage

from isoprune_hf.data.annotations import divide_annotations
from isoprune_hf.data.boxes import ObjectReader, original_size
from isoprune_hf.data.columns import OBJECTS
from isoprune_hf.data.dataset import load_data, with_encoded_images
from isoprune_hf.data.decoding import Decoding
from isoprune_hf.errors import DatasetError
from isoprune_hf.recipes import DataRecipe

BOX = List(Value("float32"), length=4)
NAMES = ["cat", "dog"]
MODEL = {0: "bird", 1: "dog", 2: "cat"}
OBJECTS_OF = [{"bbox": [[1, 2, 3, 4]], "category": [1]}, {"bbox": [], "category": []}]


def make_rows(objects: list[Any], feature: Any, name: str = "objects", more: dict[str, list] | None = None) -> Dataset:
    images = [PILImage.new("RGB", (8, 10), (60 * place, 0, 0)) for place in range(len(objects))]
    kinds = {key: Value("string" if isinstance(cells[0], str) else "int64") for key, cells in (more or {}).items()}
    features = Features({"image": Image(), name: feature, **kinds})
    return Dataset.from_dict({"image": images, name: objects, **(more or {})}, features=features)


def reader_of(objects: list[Any], feature: Any, model: dict[int, str] = MODEL) -> ObjectReader:
    return ObjectReader(make_rows(objects, feature, OBJECTS).select_columns(OBJECTS), model)


def in_struct(category: Any, name: str = "category") -> dict[str, Any]:
    return {"bbox": List(BOX), name: List(category)}


@pytest.mark.parametrize(
    ("feature", "objects"),
    [
        (in_struct(ClassLabel(names=NAMES)), {"bbox": [[1, 2, 3, 4], [0, 0, 5, 6]], "category": [1, 0]}),
        (
            in_struct(Value("string"), "categories"),
            {"bbox": [[1, 2, 3, 4], [0, 0, 5, 6]], "categories": ["dog", "cat"]},
        ),
        (in_struct(Value("int64")), {"bbox": [[1, 2, 3, 4], [0, 0, 5, 6]], "category": [1, 2]}),
        (
            List({"bbox": BOX, "category": ClassLabel(names=NAMES)}),
            [{"bbox": [1, 2, 3, 4], "category": 1}, {"bbox": [0, 0, 5, 6], "category": 0}],
        ),
    ],
    ids=["labels", "texts", "numbers", "structs"],
)
def test_objects_have_corners_and_classes(feature: Any, objects: Any) -> None:
    empty = [] if isinstance(objects, list) else {name: [] for name in objects}
    reader = reader_of([objects, empty], feature)
    found, none = reader.read(0, (10, 8)), reader.read(1, (10, 8))
    assert found.boxes.tolist() == [[1, 2, 4, 6], [0, 0, 5, 6]] and found.classes.tolist() == [1, 2]
    assert none.boxes.shape == (0, 4) and none.classes.shape == none.is_crowd.shape == (0,)


def test_crowds_are_marked() -> None:
    feature = {**in_struct(Value("int64")), "iscrowd": List(Value("int64"))}
    objects = {"bbox": [[1, 2, 3, 4], [0, 0, 5, 6]], "category": [1, 2], "iscrowd": [0, 1]}
    assert reader_of([objects], feature).read(0).is_crowd.tolist() == [False, True]


@pytest.mark.parametrize(
    ("boxes", "categories", "message"),
    [
        ([[1, 2, -3, 4]], [0], r"image 0 .* \[1.0, 2.0, -3.0, 4.0\] of negative width"),
        ([[6, 2, 4, 4]], [0], r"\[6.0, 2.0, 4.0, 4.0\], which reaches out of the image, 8 pixels wide and 10 high"),
        ([[-2, 2, 4, 4]], [0], "reaches out of the image"),
        ([[1, 2, 3, 9.5]], [0], "reaches out of the image"),
        ([[1, 2, 3, float("nan")]], [0], r"have the box \[1.0, 2.0, 3.0, nan\]; boxes are \[x, y, width, height\]"),
        ([None], [0], "have the box None"),
        ([[1, 2, 3, 4]], [3], "the category 3, which is no class of the model"),
        ([[1, 2, 3, 4]], [None], "the category None"),
        ([[1, 2, 3, 4]], [0, 1], "are 1 boxes with 2 categories"),
    ],
)
def test_wrong_object_is_refused(boxes: list[Any], categories: list[Any], message: str) -> None:
    reader = reader_of([{"bbox": boxes, "category": categories}], in_struct(Value("int64")))
    with pytest.raises(DatasetError, match=message):
        reader.read(0, (10, 8))


def test_box_may_end_on_next_pixel() -> None:
    reader = reader_of([{"bbox": [[0, 0, 9, 10]], "category": [0]}], in_struct(Value("int64")))
    assert reader.read(0, (10, 8)).boxes.tolist() == [[0, 0, 9, 10]]


def test_missing_objects_are_refused() -> None:
    with pytest.raises(DatasetError, match=r"image 1 .* are missing; an image without objects has empty lists"):
        reader_of([OBJECTS_OF[0], None], in_struct(Value("int64"))).read(1)


def test_objects_without_category_are_refused() -> None:
    with pytest.raises(DatasetError, match="the fields bbox, area, and no category"):
        reader_of([{"bbox": [], "area": []}], {"bbox": List(BOX), "area": List(Value("int64"))})


@pytest.mark.parametrize("kind", [ClassLabel(names=["cat", "cow"]), Value("string")], ids=["labels", "texts"])
def test_category_that_the_model_lacks_is_refused(kind: Any) -> None:
    objects = {"bbox": [[1, 2, 3, 4]], "category": ["cow"]}
    with pytest.raises(DatasetError, match=r"cow\) are not all among the classes of the model \(bird, dog, cat\)"):
        reader_of([objects], in_struct(kind))


def test_model_without_names_takes_numbers() -> None:
    feature = in_struct(ClassLabel(names=NAMES))
    assert reader_of(OBJECTS_OF, feature, {0: "LABEL_0", 1: "LABEL_1"}).read(0).classes.tolist() == [1]
    with pytest.raises(DatasetError, match="not all among the classes"):
        reader_of(OBJECTS_OF, feature, {0: "LABEL_0", 1: "LABEL_1", 2: "LABEL_2"})


@pytest.mark.parametrize("name", ["objects", "things"])
def test_boxes_are_found_beside_texts(name: str, tmp_path: Path) -> None:
    more = {"caption": ["a", "b"], "count": [7, 9]}  # which are no classes of the images
    make_rows(OBJECTS_OF, in_struct(ClassLabel(names=NAMES)), name, more).save_to_disk(tmp_path / "data")
    column = {} if name == "objects" else {"label_column": name}
    images = load_data(DataRecipe(dataset=str(tmp_path / "data"), holdout=0.5, **column))
    assert images.label_names == ("unlabelled",)
    rows, objects = divide_annotations(images.evaluation, OBJECTS)
    assert rows.column_names == ["image", "label"] and objects.column_names == [OBJECTS] and len(rows) == 1


def test_boxes_stay_beside_classes_in_text(tmp_path: Path) -> None:
    rows = make_rows(OBJECTS_OF, in_struct(ClassLabel(names=NAMES)), more={"label": ["b", "a"]})
    rows.save_to_disk(tmp_path / "data")
    images = load_data(DataRecipe(dataset=str(tmp_path / "data"), holdout=0.5))
    assert images.label_names == ("a", "b") and divide_annotations(images.train, OBJECTS)[1] is not None


@pytest.mark.parametrize(
    "objects", [OBJECTS_OF, [[{"bbox": [1, 2, 3, 4], "category": 1}], []]], ids=["lists", "structs"]
)
def test_boxes_of_json_lines_are_read(objects: list[Any], tmp_path: Path) -> None:
    for place in range(2):
        PILImage.new("RGB", (8, 10)).save(tmp_path / f"{place}.png")
    lines = [json.dumps({"file_name": f"{place}.png", "objects": found}) for place, found in enumerate(objects)]
    (tmp_path / "metadata.jsonl").write_text("\n".join(lines))
    images = load_data(DataRecipe(dataset=str(tmp_path), holdout=0.0))
    found = ObjectReader(divide_annotations(images.train, OBJECTS)[1], MODEL).read(0)
    assert found.boxes.tolist() == [[1, 2, 4, 6]] and found.classes.tolist() == [1]


def test_boxes_of_several_types_are_refused(tmp_path: Path) -> None:
    PILImage.new("RGB", (8, 10)).save(tmp_path / "0.png")
    line = {"file_name": "0.png", "objects": {"bbox": [[1, 2, 3, "4"]], "category": [1]}}
    (tmp_path / "metadata.jsonl").write_text(json.dumps(line))
    with pytest.raises(DatasetError, match="column 'objects' are of several types"):
        load_data(DataRecipe(dataset=str(tmp_path)))


def test_size_is_that_of_upright_image() -> None:
    image, file = PILImage.new("RGB", (8, 10)), io.BytesIO()
    exif = PILImage.Exif()
    exif[0x0112] = 6  # lies on its side
    image.save(file, "JPEG", exif=exif)
    rows = Dataset.from_dict({"image": [{"bytes": file.getvalue(), "path": None}]}).cast_column("image", Image())
    encoded = with_encoded_images(rows.add_column("label", [0]))
    assert original_size(encoded, 0, Decoding()) == (8, 10)
    assert original_size(encoded, 0, Decoding(exif=False)) == (10, 8)
    arrays = [{"image": np.zeros((10, 8, 3), np.uint8), "label": 0}]
    assert original_size(arrays, 0, Decoding()) == (10, 8)
