"""Lists of classes for each image, in every layout, become the same labels and targets."""

import json
import logging
from pathlib import Path

import pytest
import torch
from datasets import ClassLabel, Dataset, DatasetDict, Features, Image, List, Value
from helpers.evaluation import make_processor
from helpers.shapes import SHAPES, draw_sets, draw_shapes, shape_rows, write_metadata, write_pictures, write_shapes

from isoprune_hf.data.dataset import ImageData, load_data
from isoprune_hf.data.holdout import divide
from isoprune_hf.data.label_columns import read_label_lists
from isoprune_hf.data.labels import align_labels
from isoprune_hf.data.loading import CalibrationBatches, LoaderOptions, eval_loader
from isoprune_hf.data.splits import ChosenSplits
from isoprune_hf.data.streaming import calibration_split
from isoprune_hf.errors import DatasetError
from isoprune_hf.recipes import DataRecipe

SETS = [["disc"], [], ["bar", "frame"], ["frame"], ["bar", "disc", "frame"], ["bar"]]
NUMBERS = [[SHAPES.index(name) for name in names] for names in SETS]


def names_of(data: ImageData) -> list[list[str]]:
    lists = read_label_lists(data.train)
    return [sorted(data.label_names[label] for label in labels or ()) for labels in lists]


def rows_of(labels: list, kind: Value | ClassLabel) -> Dataset:
    features = Features({"image": Image(), "label": List(kind)})
    return Dataset.from_dict({"image": [draw_shapes(names, 0) for names in SETS], "label": labels}, features=features)


def write_layout(layout: str, root: Path) -> Path:
    if layout == "parquet of class labels":
        rows_of(NUMBERS, ClassLabel(names=[*SHAPES])).to_parquet(root / "train.parquet")
    elif layout == "parquet of texts":
        rows_of(SETS, Value("string")).to_parquet(root / "train.parquet")
    elif layout == "saved to disk":
        DatasetDict({"train": rows_of(NUMBERS, ClassLabel(names=[*SHAPES]))}).save_to_disk(root)
    elif layout == "metadata of a folder":
        write_metadata(root / "train", write_pictures(root / "train", SETS), SETS)
    elif layout == "numbers with classes.txt":
        write_metadata(root / "train", write_pictures(root / "train", SETS), NUMBERS)
        (root / "classes.txt").write_text("\n".join(SHAPES))
    else:
        files = write_pictures(root, SETS)
        cells = [json.dumps(names).replace('"', '""') for names in SETS]
        lines = [f'{file},"{cell}"' for file, cell in zip(files, cells, strict=True)]
        (root / "train.csv").write_text("\n".join(["file,labels", *lines]))
    return root


@pytest.mark.parametrize(
    "layout",
    [
        *("parquet of class labels", "parquet of texts", "saved to disk", "metadata of a folder"),
        *("numbers with classes.txt", "CSV with lists of JSON"),
    ],
)
def test_lists_are_read_from_every_layout(layout: str, tmp_path: Path) -> None:
    data = load_data(DataRecipe(dataset=str(write_layout(layout, tmp_path)), holdout=0.0))
    assert data.is_multi_label and data.problem_type == "multi_label_classification"
    assert data.label_names == SHAPES and names_of(data) == SETS


def test_numbers_without_names_are_classes(tmp_path: Path) -> None:
    rows_of(NUMBERS, Value("int64")).to_parquet(tmp_path / "train.parquet")
    data = load_data(DataRecipe(dataset=str(tmp_path), holdout=0.0))
    assert data.label_names == ("0", "1", "2") and read_label_lists(data.train) == NUMBERS


def test_targets_are_zeros_and_ones() -> None:
    wanted = torch.tensor([[0, 1, 0], [0, 0, 0], [1, 0, 1], [0, 0, 1], [1, 1, 1], [1, 0, 0]], dtype=torch.float32)
    rows = rows_of(NUMBERS, ClassLabel(names=[*SHAPES]))
    (batch,) = eval_loader(rows, make_processor(), LoaderOptions(8))
    assert torch.equal(batch.labels, wanted)
    stored = rows.cast_column("image", Image(decode=False)).to_iterable_dataset()
    stream = ImageData(stored, None, SHAPES, "shapes", "0", buffer=6)
    taken = calibration_split(stream, 6, 0)
    ((_, targets),) = CalibrationBatches(taken, make_processor(), LoaderOptions(8), batches=1, seed=0)
    assert sorted(map(tuple, targets.tolist())) == sorted(map(tuple, wanted.tolist()))


def test_lists_are_numbered_by_the_model(caplog: pytest.LogCaptureFixture) -> None:
    data = ImageData(rows_of(NUMBERS, ClassLabel(names=[*SHAPES])), None, SHAPES, "shapes", "0")
    with caplog.at_level(logging.WARNING):
        aligned = align_labels(data, {0: "frame", 1: "cross", 2: "bar", 3: "disc"})
    assert "3 of 4 occur" in caplog.text
    assert read_label_lists(aligned.train) == [[3], [], [2, 0], [0], [2, 3, 0], [2]]
    with pytest.raises(DatasetError, match="the classes of the data and of the model differ"):
        align_labels(data, {0: "cat", 1: "dog", 2: "owl"})


def test_each_set_of_classes_is_held_out() -> None:
    sets = [["bar"]] * 40 + [["bar", "disc"]] * 20 + [[]] * 40
    rows = Dataset.from_dict(
        {"image": [draw_shapes((), 0)] * 100, "label": sets},
        features=Features({"image": Image(), "label": List(ClassLabel(names=[*SHAPES]))}),
    )
    division = divide({"train": rows}, ChosenSplits("train", None, is_held_out=True), DataRecipe(dataset="rows"))
    counted = [tuple(labels) for labels in division.evaluation["label"]]
    assert {found: counted.count(found) for found in {*counted}} == {(0,): 4, (0, 1): 2, (): 4}


def test_fingerprint_outlasts_another_numbering(tmp_path: Path) -> None:
    write_shapes(tmp_path, images=6)
    data = load_data(DataRecipe(dataset=str(tmp_path)))
    for name, names in (("a", SHAPES), ("b", SHAPES[::-1])):
        for split, seed in (("train", 0), ("validation", 1)):
            (tmp_path / name).mkdir(exist_ok=True)
            shape_rows(6, names=names, seed=seed).to_parquet(tmp_path / name / f"{split}.parquet")
    first, second = (load_data(DataRecipe(dataset=str(tmp_path / name))) for name in ("a", "b"))
    assert first.label_names != second.label_names
    assert first.eval_fingerprint == second.eval_fingerprint
    assert names_of(data) == [sorted(names) for names in draw_sets(6)]


@pytest.mark.parametrize(
    ("labels", "kind", "reason"),
    [
        ([[0, 1, 0]] * 6, Value("int64"), "a number twice in one list, 0, 1, 0"),
        ([[0], [2], [0], [2], [0], [2]], Value("int64"), "the whole numbers 0 to n-1, or lists of them, got 0, 2"),
        ([[0.5]] * 6, Value("float64"), "the whole numbers 0 to n-1, or lists of them, got Value"),
        ([None, *[["bar"]] * 5], Value("string"), "1 of 6 images of split 'train' have no label"),
    ],
)
def test_lists_without_meaning_are_refused(labels: list, kind: Value, reason: str, tmp_path: Path) -> None:
    rows_of(labels, kind).to_parquet(tmp_path / "train.parquet")
    with pytest.raises(DatasetError, match=reason):
        load_data(DataRecipe(dataset=str(tmp_path), holdout=0.0))


def test_lists_of_python_in_csv_are_refused(tmp_path: Path) -> None:
    lines = [f"{file},\"['bar', 'disc']\"" for file in write_pictures(tmp_path, SETS)]
    (tmp_path / "train.csv").write_text("\n".join(["file,labels", *lines]))
    with pytest.raises(DatasetError, match=r"data\.label_column: column 'labels' .* not written as in JSON"):
        load_data(DataRecipe(dataset=str(tmp_path)))


def test_one_label_and_lists_do_not_mix(tmp_path: Path) -> None:
    rows_of(NUMBERS, ClassLabel(names=[*SHAPES])).to_parquet(tmp_path / "train.parquet")
    single = rows_of(NUMBERS, ClassLabel(names=[*SHAPES])).remove_columns("label")
    single = single.add_column("label", [0] * 6, feature=ClassLabel(names=[*SHAPES]))
    single.to_parquet(tmp_path / "validation.parquet")
    with pytest.raises(DatasetError, match="one class for each image of some files and lists"):
        load_data(DataRecipe(dataset=str(tmp_path)))
