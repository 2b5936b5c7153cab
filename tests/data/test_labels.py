"""Label i is the same class in every split, in the data and in the model, or the data are refused."""

import logging
from pathlib import Path

import datasets
import numpy as np
import pytest
from helpers.images import make_image
from timm.data.imagenet_info import ImageNetInfo
from transformers import ViTConfig, ViTForImageClassification

from isoprune_hf import finetune
from isoprune_hf.checkpoint.modeling_isoprune import IsoImageProcessor
from isoprune_hf.data.class_names import renumber_split
from isoprune_hf.data.dataset import ImageData, load_data
from isoprune_hf.data.images import image_batches
from isoprune_hf.data.label_columns import read_labels
from isoprune_hf.data.labels import align_labels, align_split, check_labels, match_labels
from isoprune_hf.data.streaming import StreamedSplit
from isoprune_hf.errors import DatasetError
from isoprune_hf.recipes import DataRecipe

pytestmark = pytest.mark.usefixtures("without_pause")
ANIMALS = ("cat", "dog", "frog")


@pytest.fixture
def without_pause(monkeypatch: pytest.MonkeyPatch) -> None:
    """Do not wait as `datasets` does after it has read a stream of parquet files."""
    monkeypatch.setattr(datasets.config, "SLEEP_TIME_ON_THREADS_SHUTDOWN", 0)


def write_classes(root: Path, names: list[str], split: str = "train") -> Path:
    """Write one image for each class, grey as the hash of its name."""
    for name in names:
        (root / split / name).mkdir(parents=True)
        make_image(grey(name)).save(root / split / name / "0.png")
    return root


def grey(name: str) -> int:
    return sum(map(ord, name)) % 251


def rows(names: tuple[str, ...], classes: tuple[str, ...]) -> datasets.Dataset:
    """Return one image for each of `classes`, in a column whose classes are `names`."""
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=list(names))})
    columns = {"image": [make_image(grey(name)) for name in classes], "label": [names.index(name) for name in classes]}
    return datasets.Dataset.from_dict(columns, features=features)


def assert_true_labels(images: ImageData, names: tuple[str, ...]) -> None:
    """Check that label i of every split is `names[i]`, by the pixels."""
    assert images.label_names == names
    for split in (images.train, images.evaluation):
        for row in split or ():
            assert row["image"].convert("L").getpixel((0, 0)) == grey(names[row["label"]])
        assert split is None or split.features["label"].names == list(names)


def load(root: Path) -> ImageData:
    return load_data(DataRecipe(dataset=str(root)))


def by_index(names: tuple[str, ...]) -> dict[int, str]:
    return dict(enumerate(names))


def test_numeric_folders_sort_by_value(tmp_path: Path) -> None:
    numbers = [str(number) for number in range(11)]
    assert_true_labels(load(write_classes(tmp_path / "a", numbers)), tuple(numbers))
    assert load(write_classes(tmp_path / "b", ["a10", "a9", "b"])).label_names == ("a9", "a10", "b")


def test_two_orders_without_proof_are_refused(tmp_path: Path) -> None:
    images = load(write_classes(tmp_path, [str(number) for number in range(11)]))
    with pytest.raises(DatasetError, match=r"classes\.txt"):
        align_labels(images, {index: f"LABEL_{index}" for index in range(11)})
    assert align_labels(images, by_index(images.label_names)) is images
    lexical = tuple(sorted(images.label_names))  # how torchvision numbers them
    assert_true_labels(align_labels(images, by_index(lexical)), lexical)
    (tmp_path / "classes.txt").write_text("\n".join(lexical))
    declared = align_labels(load(tmp_path), {index: f"LABEL_{index}" for index in range(11)})
    assert_true_labels(declared, lexical)


@pytest.mark.parametrize("own", [("frog", "cat", "dog"), ("frog", "dog")])
def test_splits_share_their_classes_by_name(own: tuple[str, ...], tmp_path: Path) -> None:
    rows(ANIMALS, ANIMALS).to_parquet(tmp_path / "train-0.parquet")
    rows(own, own[::-1]).to_parquet(tmp_path / "train-1.parquet")
    rows(own, own).to_parquet(tmp_path / "validation-0.parquet")
    images = load(tmp_path)
    assert_true_labels(images, ANIMALS)
    assert (len(images.train), len(images.evaluation)) == (3 + len(own), len(own))
    stream = load_data(DataRecipe(dataset=str(tmp_path), streaming=True))
    labels = [row["label"] for row in StreamedSplit(stream.train, 3, 8).rows(0, 0)]
    assert sorted(labels) == sorted([0, 1, 2, *map(ANIMALS.index, own)])


def test_only_unproven_numbers_are_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    images = load(write_classes(tmp_path, ["0", "1"]))
    align_labels(images, {0: "0", 1: "1"})
    assert "does not name its classes" not in caplog.text
    align_labels(images, {0: "LABEL_0", 1: "LABEL_1"})
    assert "class i of the data (0, 1) is output i" in caplog.text


def test_labels_follow_the_model_by_name(tmp_path: Path) -> None:
    rows(ANIMALS, ANIMALS[::-1]).to_parquet(tmp_path / "train.parquet")
    rows(ANIMALS, ANIMALS).to_parquet(tmp_path / "validation.parquet")
    reordered = ("frog", "cat", "dog")
    assert_true_labels(align_labels(load(tmp_path), by_index(reordered)), reordered)
    larger = ("owl", "frog", "cat", "dog")
    assert_true_labels(align_labels(load(tmp_path), by_index(larger)), larger)
    sampled = load_data(DataRecipe(dataset=str(tmp_path), eval_images=2))
    assert_true_labels(align_labels(sampled, by_index(larger)), larger)
    stream = align_labels(load_data(DataRecipe(dataset=str(tmp_path), streaming=True)), by_index(reordered))
    assert [row["label"] for row in StreamedSplit(stream.train, 3, 1).rows(0, 0)] == [0, 2, 1]


@pytest.mark.parametrize(
    ("data", "model"),
    [
        (("cat", "dog"), ("cat", "owl")),
        (("cat", "dog"), ("cat", "owl", "frog")),
        (("cat", "cat"), ("cat", "dog", "owl")),
        (("0", "1"), ("LABEL_0", "LABEL_1", "LABEL_2")),
    ],
)
def test_unprovable_classes_are_refused(data: tuple[str, ...], model: tuple[str, ...]) -> None:
    with pytest.raises(DatasetError, match=r"num_labels data"):
        match_labels(data, by_index(model))


def test_synsets_find_their_classes_in_imagenet() -> None:
    info = ImageNetInfo("imagenet-1k")
    synsets, words = info.label_names(), by_index(info.label_descriptions())
    cranes = ["n03126707", "n02012849", "n01440764"]  # the machine, the bird, a tench
    assert match_labels(cranes, words) == [synsets.index(synset) for synset in cranes] == [517, 134, 0]
    assert match_labels(synsets, words) == list(range(1000))
    assert match_labels(["tench, Tinca tinca", "goldfish"], by_index(synsets)) == [0, 1]


def test_model_may_have_a_name_twice(tmp_path: Path) -> None:
    rows(ANIMALS, ANIMALS).to_parquet(tmp_path / "train.parquet")
    aligned = align_labels(load(tmp_path), by_index(("crane", "dog", "crane", "frog", "cat")))
    assert list(aligned.train["label"]) == [4, 1, 3]
    assert aligned.label_names == ("crane", "dog", "crane", "frog", "cat")


def test_equal_models_need_equal_order() -> None:
    check_labels(ANIMALS, by_index(ANIMALS))
    with pytest.raises(DatasetError):
        check_labels(ANIMALS, by_index(ANIMALS[::-1]))


def test_missing_labels_stay_missing() -> None:
    split = rows(ANIMALS, ANIMALS)
    split = split.remove_columns("label").add_column("label", [0, None, -1], feature=split.features["label"])
    assert read_labels(renumber_split(split, ("b", "cat"), np.array([1, 0, 0]))).tolist() == [1, -1, -1]


def test_python_calls_number_images_as_the_model() -> None:
    order = by_index(("frog", "cat", "dog"))
    processor = IsoImageProcessor(size={"height": 4, "width": 4}, do_center_crop=False)
    loaded = image_batches(rows(ANIMALS, ANIMALS), processor, batches=1, batch_size=3, seed=0, id2label=order)
    (pixels, labels), *_ = loaded
    greys = pixels[:, 0, 0, 0].tolist()
    assert sorted(labels.tolist(), key=lambda label: greys[labels.tolist().index(label)]) == sorted(
        order, key=lambda label: grey(order[label])
    )
    config = ViTConfig()
    config.id2label = order
    aligned = align_split(rows(ANIMALS, ANIMALS), config)
    assert [order[row["label"]] for row in aligned] == list(ANIMALS)
    config = ViTConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8, image_size=4)
    config.patch_size, config.id2label = 4, by_index(("cat", "owl", "ape"))
    with pytest.raises(DatasetError, match="differ at"):
        finetune(ViTForImageClassification(config), rows(ANIMALS, ANIMALS), processor)
