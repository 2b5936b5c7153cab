"""However the images of one data set lie in files, the same rows are read, and what is left out is named."""

import csv
import io
import logging
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import datasets
import pytest
from helpers.images import make_image, write_tar
from PIL import Image
from torchvision.datasets import ImageFolder

from isoprune_hf.data import sources
from isoprune_hf.data.dataset import ImageData, load_data
from isoprune_hf.data.labels import align_labels
from isoprune_hf.errors import DatasetError
from isoprune_hf.recipes import DataRecipe

ROWS = ((3, "a"), (5, "b"), (8, "b"))  # grey value and class


def table(image: str = "image", label: str = "label", **others: object) -> datasets.Dataset:
    features = {image: datasets.Image(), label: datasets.ClassLabel(names=["a", "b"]), **dict.fromkeys(others)}
    columns = {image: [make_image(value) for value, _ in ROWS], label: [name == "b" for _, name in ROWS]}
    for name, (kind, cells) in others.items():
        features[name], columns[name] = kind, cells
    return datasets.Dataset.from_dict(columns, features=datasets.Features(features))


def write_classes(root: Path, name: str = "{}") -> Path:
    for value, label in ROWS:
        path = root / label / name.format(value)
        path.parent.mkdir(parents=True, exist_ok=True)
        make_image(value).save(path, "PNG")
    return root


def write_csv(root: Path, name: str = "train.csv") -> Path:
    write_classes(root / "files", "{}.png")
    with (root / name).open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerows([("file", "species"), *((f"files/{label}/{value}.png", label) for value, label in ROWS)])
    return root


def save(rows: datasets.Dataset, path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    rows.to_parquet(path)
    return path


def in_one_file(root: Path) -> Path:
    return save(table(), root / "images.parquet")


def saved_to_disk(root: Path) -> Path:
    table().save_to_disk(str(root / "saved"))
    return root / "saved"


def with_text(root: Path) -> Path:
    kinds = {"text": (datasets.Value("string"), [label for _, label in ROWS])}
    return save(table(**kinds).remove_columns("label"), root / "train.parquet").parent


def linked(root: Path) -> Path:
    write_classes(root / "real", "{}.png")
    for label in "ab":
        (root / "train").mkdir(exist_ok=True)
        (root / "train" / label).symlink_to(root / "real" / label)
    return root


def nested(root: Path) -> Path:
    write_classes(root / "train", "x/y/{}.png")
    return root


def zipped(root: Path, wrapper: str = "") -> Path:
    write_classes(root / "d" / wrapper / "train", "{}.png")
    return Path(shutil.make_archive(str(root / "images"), "zip", root / "d"))


LAYOUTS: dict[str, Callable[[Path], Path]] = {
    "classes below splits": lambda root: write_classes(root / "train", "{}.png").parent,
    "classes at the root": lambda root: write_classes(root, "{}.png"),
    "nested files": nested,
    "linked classes": linked,
    "files without an ending": lambda root: write_classes(root / "train").parent,
    "a zip": zipped,
    "a zip of a folder": lambda root: zipped(root, "my images"),
    "numbers as endings": lambda root: write_classes(root / "train", "img.{}").parent,
    "another case": lambda root: write_classes(root / "Train", "{}.PNG").parent,
    "one parquet file": in_one_file,
    "a folder of one parquet file": lambda root: in_one_file(root).parent,
    "parquet below data": lambda root: save(table(), root / "data" / "train-0.parquet").parent.parent,
    "saved to disk": saved_to_disk,
    "a table": write_csv,
    "a file of a table": lambda root: write_csv(root) / "train.csv",
    "columns of other names": lambda root: save(table("img", "fine_label"), root / "train.parquet").parent,
    "labels as text": with_text,
    "brackets": lambda root: save(table(), root / "d [v1]" / "train.parquet").parent,
    "classes and brackets": lambda root: write_classes(root / "d[v1]" / "train", "{}.png").parent,
    "two colons": lambda root: write_classes(root / "d::x" / "train", "{}.png").parent,
}


@pytest.fixture(autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a cache of `datasets` of its own."""
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", folder)
    return folder


def load(path: Path, **settings: object) -> ImageData:
    return load_data(DataRecipe(dataset=str(path), **settings))


def rows_of(split: datasets.Dataset | None) -> list[tuple[int, str]]:
    names = split.features["label"].names if split is not None else []
    encoded = split.cast_column("image", datasets.Image(decode=False)) if split is not None else []
    return [(value_of(row["image"]), names[row["label"]]) for row in encoded]


def value_of(encoded: dict) -> int:
    content = Path(encoded["path"]).read_bytes() if encoded["bytes"] is None else encoded["bytes"]
    return Image.open(io.BytesIO(content)).convert("L").getpixel((0, 0))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layout_gives_the_same_rows(layout: str, tmp_path: Path) -> None:
    images = load(LAYOUTS[layout](tmp_path))
    assert images.label_names == ("a", "b")
    assert sorted(rows_of(images.train)) == sorted(ROWS) and images.evaluation is None


@pytest.mark.parametrize("name", ["val", "valid", "Validation", "dev", "TEST"])
def test_evaluation_split_has_usual_names(name: str, tmp_path: Path) -> None:
    write_classes(tmp_path / "train", "{}.png")
    write_classes(tmp_path / name, "{}.png")
    save(table(), tmp_path / "p" / "train.parquet")
    save(table(), tmp_path / "p" / f"{name}-0.parquet")
    for place in (tmp_path, tmp_path / "p"):
        assert len(load(place).evaluation) == 3


def test_missing_evaluation_split_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    images = load(in_one_file(tmp_path), holdout=0)
    assert "its only split is used whole" in caplog.text and images.is_undivided
    whole = images.evaluating_all(None)
    assert sorted(rows_of(whole.evaluation)) == sorted(ROWS)
    assert images.evaluating_all(2).split_images == 3
    divided = load(save(table(), tmp_path / "d" / "train.parquet").parent, holdout=0)
    assert "so nothing is evaluated" in caplog.text and divided.evaluating_all(None).evaluation is None


def test_slices_share_a_split(tmp_path: Path) -> None:
    root = write_classes(tmp_path, "{}.png")
    for number in range(10, 17):
        make_image(number).save(root / "a" / f"{number}.png")
    parts = load(root, train_split="train[:80%]", eval_split="train[80%:]")
    train, evaluation = rows_of(parts.train), rows_of(parts.evaluation)
    assert (len(train), len(evaluation)) == (8, 2) and not set(train) & set(evaluation)
    assert {label for _, label in train} == {"a", "b"}  # not the first classes only
    assert rows_of(load(root, train_split="train[:80%]", holdout=0).train) == train


@pytest.mark.parametrize("value", ["train[a:b]", "train[3:3]", "train[:20%][1:]"])
def test_bad_slice_names_its_setting(value: str, tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match=r"train_split|neither"):
        load(in_one_file(tmp_path), train_split=value)
    with pytest.raises(DatasetError, match="stream"):
        load(in_one_file(tmp_path), train_split="train[1:]", streaming=True)


def test_several_candidates_are_named(tmp_path: Path) -> None:
    classes = datasets.ClassLabel(names=["x", "y"])
    rows = table("img", "fine_label", coarse_label=(classes, [0, 1, 1]), id=(datasets.Value("int64"), [0, 1, 2]))
    place = save(rows, tmp_path / "train.parquet")
    with pytest.raises(DatasetError, match=r"fine_label, coarse_label; .*--data\.label_column"):
        load(place)
    assert load(place, label_column="coarse_label").label_names == ("x", "y")


def test_left_out_files_are_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING)
    write_classes(tmp_path / "train", "{}.png")
    for name in ("a/notes.txt", "a/x/._3.png", "list.csv", "empty/", "__MACOSX/a/1.png"):
        path = tmp_path / "train" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch() if path.suffix else path.mkdir()
    make_image(9).save(tmp_path / "train" / "b" / "z.avif")
    for name in (".c", "__d__"):
        (tmp_path / "train" / name).mkdir()
        make_image(9).save(tmp_path / "train" / name / "0.png")
    images = load(tmp_path)
    assert images.label_names == (".c", "__d__", "a", "b") and len(images.train) + len(images.evaluation) == 6
    assert "3 files that are not images: a/notes.txt, a/x/._3.png, list.csv" in caplog.text
    assert "1 class folders without images: empty" in caplog.text


def test_class_folders_equal_those_of_torchvision(tmp_path: Path) -> None:
    write_classes(tmp_path / "train", "x/{}.png")
    for name in (".c", "__d__"):
        (tmp_path / "train" / name).mkdir()
        make_image(9).save(tmp_path / "train" / name / "0.png")
    reference = ImageFolder(str(tmp_path / "train"))
    expected = sorted((image.getpixel((0, 0))[0], reference.classes[label]) for image, label in reference)
    assert sorted(rows_of(load(tmp_path).train)) == expected


def test_link_to_a_folder_above_ends(tmp_path: Path) -> None:
    root = write_classes(tmp_path / "train", "{}.png")
    (root / "a" / "loop").symlink_to(root)
    assert ("a" in load(tmp_path).label_names) and len(load(tmp_path).train) >= 3


def test_tar_files_without_split_are_undivided(tmp_path: Path) -> None:
    write_tar(tmp_path / "0000.tar", {"a": 0, "b": 1})
    assert load(tmp_path / "0000.tar").is_undivided and len(load(tmp_path).train) == 2


@pytest.mark.parametrize(
    ("name", "content", "setting"),
    [
        ("images.zip", "", "dataset"),
        ("train.csv", "file,label\n", "dataset"),
        ("train.csv", "file,label\nnone.png,a\n", "image_column"),
        ("d::x/train.parquet", None, "dataset"),
    ],
)
def test_unreadable_file_names_its_setting(name: str, content: str | None, setting: str, tmp_path: Path) -> None:
    path = tmp_path / name
    if content is None:
        save(table(), path)
    else:
        path.write_text(content)
    with pytest.raises(DatasetError, match=rf"data\.{setting}"):
        load(path)


def test_changed_zip_is_unpacked_again(tmp_path: Path, cache: Path) -> None:
    first = load(zipped(tmp_path))
    make_image(9).save(tmp_path / "d" / "train" / "a" / "9.png")
    again = load(zipped(tmp_path))
    assert (len(first.train), len(again.train)) == (3, 4) and len(load(zipped(tmp_path)).train) == 4
    assert [path for path in cache.rglob("*") if path.suffix == ".tmp"] == []


def test_zip_without_room_is_refused(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda place: SimpleNamespace(free=10))
    with pytest.raises(DatasetError, match=r"data\.dataset"):
        load(zipped(tmp_path))
    assert [path for path in cache.rglob("*") if path.is_file()] == []


def test_misspelt_place_names_a_near_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def load_dataset(*arguments: object, **options: object) -> None:
        raise FileNotFoundError("not on the Hub")

    monkeypatch.setattr(sources, "load_dataset", load_dataset)
    write_classes(tmp_path / "flowers" / "train", "{}.png")
    for given, near in (("dgits", "digits"), (tmp_path / "flowesr", tmp_path / "flowers")):
        with pytest.raises(DatasetError, match=rf"data\.dataset.*did you mean {near}\?"):
            load(given)


def test_missing_subset_names_all(monkeypatch: pytest.MonkeyPatch) -> None:
    def load_dataset(name: str, subset: str | None, **options: object) -> dict[str, datasets.Dataset]:
        if subset is None:
            raise ValueError("Config name is missing.\nPlease pick one among the available configs: ['full', 'mini']")
        if subset != "mini":
            raise ValueError(f"BuilderConfig {subset!r} not found. Available: ['full', 'mini']")
        return {"train": table()}

    monkeypatch.setattr(sources, "load_dataset", load_dataset)
    assert len(load_data(DataRecipe("hf:user/name", subset="mini")).train) == 3
    for subset in (None, "big"):
        with pytest.raises(DatasetError, match=r"data\.subset.*\['full', 'mini'\]"):
            load_data(DataRecipe("user/name", subset=subset))


def test_text_of_each_image_is_no_class(tmp_path: Path) -> None:
    count = 101
    features = datasets.Features({"image": datasets.Image(), "caption": datasets.Value("string")})
    columns = {"image": [make_image(0)] * count, "caption": [f"image {number}" for number in range(count)]}
    place = save(datasets.Dataset.from_dict(columns, features=features), tmp_path / "train.parquet")
    with pytest.raises(DatasetError, match=r"data\.label_column"):
        load(place)


def test_fingerprint_is_that_of_the_images(tmp_path: Path) -> None:
    places = [
        LAYOUTS[layout](tmp_path / str(number)) for number, layout in enumerate(("classes at the root", "a table"))
    ]
    first, moved = (load(place).evaluating_all(None) for place in places)
    assert first.eval_fingerprint == moved.eval_fingerprint
    reordered = align_labels(first, {0: "b", 1: "a"})
    assert reordered.eval_fingerprint == first.eval_fingerprint
    make_image(77).save(places[0] / "b" / "8.png")  # another image of the same name and class
    assert load(places[0]).evaluating_all(None).eval_fingerprint != first.eval_fingerprint
    assert first.with_provenance({}) == {"data": first.eval_fingerprint, "split": "all"}
    sliced = load(places[0], eval_split="train[:50%]")
    assert sliced.with_provenance({})["split"] == "all[:50%]"


@pytest.mark.parametrize("ending", ["parquet", "tar", "csv"])
def test_pipes_are_no_files_of_a_data_set(ending: str, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / f"train.{ending}")
    with pytest.raises(DatasetError):
        load_data(DataRecipe(str(tmp_path)))
