"""Images without labels are one class of their own, which no classifier takes."""

from collections.abc import Callable
from pathlib import Path

import datasets
import numpy as np
import pytest
from helpers.images import make_image
from helpers.training import make_net, make_recipe, train

from isoprune_hf.data.dataset import ImageData, load_data
from isoprune_hf.data.decoding import Decoding, read_or_replace
from isoprune_hf.data.labels import align_labels
from isoprune_hf.data.unlabelled import UNLABELLED
from isoprune_hf.errors import DatasetError
from isoprune_hf.recipes import DataRecipe


def write_flat(folder: Path, values: range) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for value in values:
        make_image(value).save(folder / f"{value}.png")
    (folder / "notes.txt").write_text("no image")
    return folder


def write_parquet(folder: Path) -> Path:
    folder.mkdir()
    images = [make_image(value) for value in range(8, 12)]
    features = datasets.Features({"image": datasets.Image(), "image_id": datasets.Value("int64")})
    rows = datasets.Dataset.from_dict({"image": images, "image_id": [3, 4, 5, 6]}, features=features)
    rows.to_parquet(folder / "train.parquet")
    return folder


LAYOUTS: dict[str, Callable[[Path], Path]] = {
    "images in a folder": lambda root: write_flat(root / "flat", range(8, 12)),
    "images in folders of splits": lambda root: write_flat(root / "flat" / "train", range(8, 12)).parent,
    "a table without a column of classes": lambda root: write_parquet(root / "flat"),
}


def load(place: Path, **settings: object) -> ImageData:
    return load_data(DataRecipe(dataset=str(place), **{"holdout": 0.0, **settings}))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_gives_the_same_images(layout: str, tmp_path: Path) -> None:
    images = load(LAYOUTS[layout](tmp_path))
    assert images.label_names == (UNLABELLED,) and images.train["label"] == [0] * 4
    found = [read_or_replace(images.train, place, Decoding()).image for place in range(4)]
    assert [int(np.asarray(image)[0, 0, 0]) for image in found] == [8, 9, 10, 11]  # 8 before 10


def test_splits_are_those_of_the_folders(tmp_path: Path) -> None:
    write_flat(tmp_path / "flat" / "train", range(6))
    write_flat(tmp_path / "flat" / "val", range(6, 8))
    images = load(tmp_path / "flat")
    assert len(images.train) == 6 and len(images.evaluation) == 2


def test_a_tenth_of_one_folder_is_held_out(tmp_path: Path) -> None:
    images = load(write_flat(tmp_path / "flat", range(40)), holdout=None)
    assert len(images.train) == 36 and len(images.evaluation) == 4


def test_stream_without_labels_has_the_same_rows(tmp_path: Path) -> None:
    images = load(write_parquet(tmp_path / "flat"), streaming=True)
    assert [row["label"] for row in images.train] == [0] * 4 and images.label_names == (UNLABELLED,)


def test_folders_beside_images_stay_classes(tmp_path: Path) -> None:
    for name in ("train", "bus"):
        write_flat(tmp_path / "flat" / name, range(2))
    assert load(tmp_path / "flat").label_names == ("bus", "train")


def test_classifiers_refuse_images_without_labels(tmp_path: Path) -> None:
    images = load(write_flat(tmp_path / "flat", range(8)))
    with pytest.raises(DatasetError, match=r"have no labels.*--data\.label_column"):
        align_labels(images, {0: UNLABELLED})
    with pytest.raises(DatasetError, match="have no labels"):
        train(make_net(), make_recipe(), data=images)
