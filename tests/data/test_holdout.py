"""Without a split for evaluation, the same images of the training split are held out in every stage."""

import logging
from pathlib import Path

import datasets
import numpy as np
import pytest
from helpers.images import make_image

from isoprune_hf.data.dataset import ImageData, load_data
from isoprune_hf.errors import RecipeError
from isoprune_hf.recipes import DataRecipe

CLASSES = {"a": 30, "b": 20, "c": 10}


@pytest.fixture(autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Return a folder of class folders whose images have one grey value each."""
    value = 0
    for name, count in CLASSES.items():
        (tmp_path / "images" / name).mkdir(parents=True)
        for _ in range(count):
            make_image(value).save(tmp_path / "images" / name / f"{value:03}.png")
            value += 1
    return tmp_path / "images"


def load(path: Path, **settings: object) -> ImageData:
    return load_data(DataRecipe(dataset=str(path), **settings))


def values_of(split: datasets.Dataset) -> list[int]:
    return [np.asarray(row["image"])[0, 0, 0].item() for row in split]


def classes_of(split: datasets.Dataset) -> dict[str, int]:
    names = split.features["label"].names
    return {name: split["label"][:].count(index) for index, name in enumerate(names)}


def parquet(folder: Path) -> Path:
    rows = load(folder, holdout=0).train
    (folder.parent / "p").mkdir()
    rows.to_parquet(folder.parent / "p" / "train.parquet")
    return folder.parent / "p"


def test_each_class_gives_its_share(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    images = load(folder)
    assert classes_of(images.evaluation) == {"a": 3, "b": 2, "c": 1}
    assert classes_of(images.train) == {"a": 27, "b": 18, "c": 9}
    assert sorted(values_of(images.train) + values_of(images.evaluation)) == list(range(60))
    assert "6 of 60 training images are held out by seed 0" in caplog.text


@pytest.mark.parametrize(
    "settings", [{}, {"train_split": "train[:50%]"}, {"eval_images": 4}, {"batch_size": 3}, {"train_split": "all"}]
)
def test_stages_hold_out_the_same_images(settings: dict[str, object], folder: Path) -> None:
    expected = values_of(load(folder).evaluation)
    for place in (folder, parquet(folder)):
        images = load(place, **settings) if settings != {"train_split": "all"} or place == folder else load(place)
        assert set(values_of(images.evaluation)) <= set(expected)
        assert len(images.evaluation) == settings.get("eval_images", 6)
        assert not set(values_of(images.train)) & set(expected)
        assert images.with_provenance({})["split_images"] == 60 and images.with_provenance({})["holdout_seed"] == 0


def test_share_of_zero_holds_none_out(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    images = load(folder, holdout=0)
    assert len(images.train) == 60 and images.evaluation is None and "used whole" in caplog.text
    assert images.identity == {"the data set": images.fingerprint}
    assert load(folder).identity["data.holdout"] == 0.1
    assert load(folder).fingerprint != images.fingerprint
    with pytest.raises(RecipeError, match=r"data\.holdout"):
        DataRecipe(holdout=1)


def test_few_images_hold_none_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for value in range(4):
        (tmp_path / str(value % 2)).mkdir(exist_ok=True)
        make_image(value).save(tmp_path / str(value % 2) / f"{value}.png")
    images = load(tmp_path)
    assert len(images.train) == 4 and images.evaluation is None and images.holdout is None
    assert "too few" in caplog.text
    assert len(load(tmp_path, holdout=0.99).train) == 1


def test_split_for_evaluation_holds_none_out(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    (folder.parent / "images").rename(folder.parent / "train")
    (folder.parent / "test" / "a").mkdir(parents=True)
    make_image(99).save(folder.parent / "test" / "a" / "0.png")
    images = load(folder.parent)
    assert len(images.train) == 60 and images.holdout is None and "held out" not in caplog.text
    named = load(folder.parent, eval_split="none")  # a name of the user is not replaced
    assert len(named.train) == 60 and named.evaluation is None


def test_stream_holds_none_out(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    images = load(folder, streaming=True)
    assert len(list(images.train)) == 60 and images.holdout is None and "held out" not in caplog.text
