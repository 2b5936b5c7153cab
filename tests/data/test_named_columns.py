"""The column that `label_column` names is used in every layout, whatever lies beside it, or refused by the task."""

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from datasets import ClassLabel, Dataset, DatasetDict, Features, Image, List, Value
from helpers.images import make_image
from PIL import Image as PILImage

from isoprune_hf import IsoPruneConfig
from isoprune_hf.commands.steps.sources import align_images
from isoprune_hf.data.annotations import divide_annotations
from isoprune_hf.data.columns import MASK, OBJECTS, NamedColumn
from isoprune_hf.data.dataset import ImageData, load_data
from isoprune_hf.data.masks import read_mask
from isoprune_hf.errors import DatasetError
from isoprune_hf.recipes import DataRecipe

VALUES = (3, 5, 8)  # grey value of each image, and class of its mask
BOXES = Features({"bbox": List(List(Value("float32"), length=4)), "category": List(Value("int64"))})
OBJECTS_OF = {"bbox": [[1, 2, 3, 4]], "category": [1]}
KINDS: dict[str, tuple[Any, Callable[[int], Any]]] = {
    "masks": (Image(), lambda value: PILImage.fromarray(np.full((4, 6), value, np.uint8))),
    "other masks": (Image(), lambda value: PILImage.fromarray(np.full((4, 6), 99, np.uint8))),
    "boxes": (BOXES, lambda value: OBJECTS_OF),
    "classes": (ClassLabel(names=["a", "b"]), lambda value: int(value > 3)),
    "numbers": (Value("int64"), lambda value: int(value > 3)),
    "captions": (Value("string"), lambda value: f"number {value}"),
    "counts": (Value("int64"), lambda value: value),
}


def make_rows(columns: dict[str, str]) -> Dataset:
    """Return images beside columns of the kinds."""
    features = {"image": Image(), **{name: KINDS[kind][0] for name, kind in columns.items()}}
    cells = {name: [KINDS[kind][1](value) for value in VALUES] for name, kind in columns.items()}
    return Dataset.from_dict({"image": [*map(make_image, VALUES)], **cells}, features=Features(features))


def write_parquet(root: Path, columns: dict[str, str]) -> None:
    make_rows(columns).to_parquet(root / "train.parquet")


def write_pandas(root: Path, columns: dict[str, str]) -> None:
    """Write a table whose files are not declared as images."""
    rows = make_rows(columns)
    files = [name for name, feature in rows.features.items() if isinstance(feature, Image)]
    undeclared = {name: {"bytes": Value("binary"), "path": Value("string")} for name in files}
    table = rows.with_format("arrow")[:]
    cells = {name: table[name].to_pylist() for name in table.column_names}
    Dataset.from_dict(cells, features=Features({**rows.features, **undeclared})).to_parquet(root / "train.parquet")


def write_lines(root: Path, columns: dict[str, str], end: str = "") -> None:
    """Write files of images and of masks, and a line for each image."""
    (root / "train" / "files").mkdir(parents=True)
    lines = []
    for place, value in enumerate(VALUES):
        make_image(value).save(root / "train" / f"{place}.png")
        line: dict[str, Any] = {"file_name": f"{place}.png"}
        for name, kind in columns.items():
            line[name] = KINDS[kind][1](value)
            if KINDS[kind][0] == Image():
                line.pop(name).save(root / "train" / "files" / f"{name}{place}.png")
                line[f"{name}{end}"] = f"files/{name}{place}.png"
        lines.append(json.dumps(line))
    (root / "train" / "metadata.jsonl").write_text("\n".join(lines))


LAYOUTS: dict[str, Callable[[Path, dict[str, str]], None]] = {
    "parquet": write_parquet,
    "parquet without types of images": write_pandas,
    "save_to_disk": lambda root, columns: DatasetDict({"train": make_rows(columns)}).save_to_disk(root),
    "lines": write_lines,
    "lines in the form of datasets": lambda root, columns: write_lines(root, columns, "_file_name"),
}
layouts = pytest.mark.parametrize("layout", LAYOUTS)


def load(root: Path, **settings: Any) -> ImageData:
    return load_data(DataRecipe(dataset=str(root), **{"holdout": 0.0, **settings}))


def masks_of(images: ImageData) -> list[int]:
    """Return the class of each mask, which has one."""
    _, masks = divide_annotations(images.train, MASK)
    return [int(read_mask(row[MASK], reduces_labels=False).unique()) for row in masks]


@layouts
@pytest.mark.parametrize("name", ["gt", "mask"])
def test_named_masks_are_used(name: str, layout: str, tmp_path: Path) -> None:
    LAYOUTS[layout](tmp_path, {"annotation": "other masks", name: "masks", "scene": "numbers"})
    images = load(tmp_path, label_column=name)
    assert masks_of(images) == [*VALUES] and images.label_names == ("unlabelled",)
    assert images.named == NamedColumn(name, "masks")


@layouts
def test_named_boxes_are_used(layout: str, tmp_path: Path) -> None:
    LAYOUTS[layout](tmp_path, {"objects": "counts", "things": "boxes", "count": "counts"})
    images = load(tmp_path, label_column="things")
    assert divide_annotations(images.train, OBJECTS)[1][0][OBJECTS] == OBJECTS_OF
    assert images.named == NamedColumn("things", "boxes")


@layouts
@pytest.mark.parametrize("kind", ["masks", "boxes"])
def test_list_of_classes_needs_no_labels(kind: str, layout: str, tmp_path: Path) -> None:
    LAYOUTS[layout](tmp_path, {"objects" if kind == "boxes" else "mask": kind, "count": "counts"})
    (tmp_path / "classes.txt").write_text("cat\ndog")
    images = load(tmp_path)
    assert images.label_names == ("unlabelled",) and images.named is None
    assert divide_annotations(images.train, OBJECTS if kind == "boxes" else MASK)[1] is not None


@layouts
def test_list_of_classes_names_numbers(layout: str, tmp_path: Path) -> None:
    LAYOUTS[layout](tmp_path, {"mask": "masks", "label": "numbers"})
    (tmp_path / "classes.txt").write_text("cat\ndog\nbird")
    images = load(tmp_path)
    assert images.label_names == ("cat", "dog", "bird") and images.train["label"] == [0, 1, 1]
    assert masks_of(images) == [*VALUES]


@layouts
def test_captions_beside_masks_are_no_classes(layout: str, tmp_path: Path) -> None:
    LAYOUTS[layout](tmp_path, {"mask": "masks", "caption": "captions", "count": "counts", "place": "counts"})
    images = load(tmp_path)
    assert images.label_names == ("unlabelled",) and masks_of(images) == [*VALUES]


def test_missing_column_is_told_beside_others(tmp_path: Path) -> None:
    write_parquet(tmp_path, {"annotation": "masks", "objects": "boxes"})
    with pytest.raises(DatasetError, match=r"no column 'gt'; its columns are image, annotation, objects$"):
        load(tmp_path, label_column="gt")


def test_missing_mask_is_refused(tmp_path: Path) -> None:
    write_lines(tmp_path, {"mask": "masks"})
    lines = [json.loads(line) for line in (tmp_path / "train" / "metadata.jsonl").read_text().splitlines()]
    (tmp_path / "train" / "metadata.jsonl").write_text(
        "\n".join(map(json.dumps, [lines[0], {**lines[1], "mask": None}]))
    )
    with pytest.raises(DatasetError, match="an image has no mask"):
        masks_of(load(tmp_path))


TASKS = {  # name of a network of a task, and the annotations that it uses
    "image-classification": ["classes"],
    "image-feature-extraction": ["classes"],
    "zero-shot-image-classification": ["classes"],
    "semantic-segmentation": ["masks"],
    "object-detection": ["boxes"],
    "depth-estimation": [],
}


@pytest.mark.parametrize("kind", ["classes", "masks", "boxes"])
@pytest.mark.parametrize("task", TASKS)
def test_task_refuses_named_columns_of_others(task: str, kind: str, tmp_path: Path) -> None:
    write_parquet(tmp_path, {"named": kind})
    images = load(tmp_path, label_column="named")
    config = IsoPruneConfig(base={"task": task}, id2label={0: "a", 1: "b"})
    model = SimpleNamespace(config=config)
    if kind in TASKS[task]:
        assert align_images(images, model).train is not None
        return
    reads = "reads no annotations; leave" if not TASKS[task] else f"reads {TASKS[task][0]}; name a column of"
    with pytest.raises(
        DatasetError, match=f"^data.label_column: the column 'named' .* has {kind}, and {task} {reads}"
    ):
        align_images(images, model)


def test_unnamed_columns_of_others_are_ignored(tmp_path: Path) -> None:
    write_parquet(tmp_path, {"mask": "masks", "label": "classes"})
    model = SimpleNamespace(config=IsoPruneConfig(base={"task": "object-detection"}))
    assert align_images(load(tmp_path), model).train is not None
