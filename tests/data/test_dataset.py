import multiprocessing
import pickle
import sys
import tarfile
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from datasets.packaged_modules.webdataset.webdataset import WebDataset
from helpers.images import make_image, write_tar
from PIL import Image

from isoprune_hf.checkpoint.modeling_isoprune import IsoImageProcessor
from isoprune_hf.data import sources as opening_module
from isoprune_hf.data.dataset import load_data
from isoprune_hf.data.epochs import EpochOrder, train_batches
from isoprune_hf.data.labels import check_labels
from isoprune_hf.data.loading import CalibrationBatches, LoaderOptions, Ranks, calibration_ids, eval_loader
from isoprune_hf.data.pixels import EvaluationTransform, normalised
from isoprune_hf.errors import DatasetError, MissingExtraError
from isoprune_hf.recipes import DataRecipe

SYNSETS = ("n01440764", "n01443537", "n01484850")  # tench, goldfish, great white shark
PROCESSOR = IsoImageProcessor(size={"height": 4, "width": 4}, do_center_crop=False)


def make_split(labels: list[int], feature: object = None, column: str = "label") -> datasets.Dataset:
    feature = feature or datasets.ClassLabel(names=["cat", "dog", "owl"])
    features = datasets.Features({"image": datasets.Image(), column: feature})
    columns = {"image": [make_image(index) for index in range(len(labels))], column: labels}
    return datasets.Dataset.from_dict(columns, features=features)


def write_folder(root: Path, names: dict[str, tuple[str, ...]], images: int = 2) -> Path:
    for split, classes in names.items():
        for number, name in enumerate(classes):
            (root / split / name).mkdir(parents=True)
            for index in range(images):
                make_image(10 * number + index).save(root / split / name / f"test-{index}.PNG")
    return root


def save_splits(root: Path, **splits: datasets.Dataset) -> DataRecipe:
    datasets.DatasetDict(splits).save_to_disk(str(root / "saved"))
    return DataRecipe(dataset=str(root / "saved"))


def message_of(recipe: DataRecipe) -> str:
    with pytest.raises(DatasetError) as caught:
        load_data(recipe)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_digits_have_a_fixed_stratified_split():
    loaded = load_data(DataRecipe(dataset="digits"))
    assert (len(loaded.train), len(loaded.evaluation)) == (1347, 450)
    assert loaded.label_names == tuple("0123456789") and loaded.name == "digits"
    assert min(np.bincount(loaded.evaluation["label"])) >= 43
    image = loaded.train[0]["image"]
    assert image.size == (16, 16) and image.mode == "RGB" and np.asarray(image).max() > 200
    assert load_data(DataRecipe(dataset="digits")).fingerprint == loaded.fingerprint


def test_evaluation_sample_is_part_of_the_split():
    whole = load_data(DataRecipe(dataset="digits"))
    samples = [load_data(DataRecipe(dataset="digits", eval_images=count)) for count in (100, 100, 450, 1000)]
    assert [len(loaded.evaluation) for loaded in samples] == [100, 100, 450, 450]
    assert [loaded.split_images for loaded in (whole, *samples)] == [None, 450, 450, None, None]
    assert {loaded.fingerprint for loaded in samples} == {whole.fingerprint}
    rows = {row["image"].tobytes() for row in whole.evaluation}
    first, second = ([row["image"].tobytes() for row in loaded.evaluation] for loaded in samples[:2])
    assert first == second and set(first) <= rows
    assert min(np.bincount(samples[0].evaluation["label"], minlength=10)) >= 3  # not the first rows of a sorted split
    origin = {"images": 100, "split_images": 450, "split": "validation", "data": samples[0].eval_fingerprint}
    assert samples[0].with_provenance({"images": 100}) == origin
    assert "split_images" not in whole.with_provenance({"images": 450})
    assert samples[0].eval_fingerprint != whole.eval_fingerprint == samples[2].eval_fingerprint


def test_digits_without_scikit_learn_name_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(MissingExtraError, match=r"digits .*sklearn, .*isoprune-hf\[train\]"):
        load_data(DataRecipe(dataset="digits"))


def test_class_folders_are_sorted_and_val_is_validation(tmp_path):
    loaded = load_data(DataRecipe(dataset=str(write_folder(tmp_path, {"train": SYNSETS, "val": SYNSETS}))))
    assert loaded.label_names == SYNSETS
    assert loaded.train.column_names == ["image", "label"] and len(loaded.train) == len(loaded.evaluation) == 6
    assert [row["label"] for row in loaded.train] == [0, 0, 1, 1, 2, 2]
    assert loaded.train[3]["image"].getpixel((0, 0)) == (11, 11, 11)


def test_a_folder_of_one_class_keeps_its_label(tmp_path):
    loaded = load_data(DataRecipe(dataset=str(write_folder(tmp_path, {"train": ("cat",)}))))
    assert loaded.label_names == ("cat",) and loaded.evaluation is None


@pytest.mark.parametrize("below", ["", "data"])
def test_parquet_files_are_split_by_first_word(tmp_path, below):
    (tmp_path / below).mkdir(exist_ok=True)
    split = make_split([0, 1, 2, 0])
    split.select([0, 1]).to_parquet(tmp_path / below / "train-00000-of-00002.parquet")
    split.select([2, 3]).to_parquet(tmp_path / below / "train-00001-of-00002.parquet")
    make_split([2, 1]).to_parquet(tmp_path / below / "val.parquet")
    loaded = load_data(DataRecipe(dataset=str(tmp_path)))
    assert list(loaded.train["label"]) == [0, 1, 2, 0] and list(loaded.evaluation["label"]) == [2, 1]
    assert loaded.label_names == ("cat", "dog", "owl")
    assert loaded.train[2]["image"].convert("RGB").getpixel((0, 0)) == (2, 2, 2)


@pytest.mark.parametrize("names", [("a-train-{}.tar", "a-val-{}.tar"), ("train/{}.tar", "validation/{}.tar")])
def test_tar_files_equal_a_folder_of_classes(names, tmp_path):
    (tmp_path / "tars").mkdir()
    (tmp_path / "tars" / "classes.txt").write_text("\n".join(SYNSETS) + "\n")
    write_tar(tmp_path / "tars" / names[0].format("0000"), {"test-0": 0, "test-1": 0, "x/test-2": 1})
    write_tar(tmp_path / "tars" / names[0].format("0001"), {"test-3": 1, "test-4": 2})
    write_tar(tmp_path / "tars" / names[1].format("0000"), {"b": 2})
    loaded = load_data(DataRecipe(dataset=str(tmp_path / "tars")))
    assert loaded.label_names == SYNSETS and loaded.train.column_names == ["image", "label"]
    assert list(loaded.train["label"]) == [0, 0, 1, 1, 2] and list(loaded.evaluation["label"]) == [2]
    values = [row["image"].convert("RGB").getpixel((0, 0))[0] for row in loaded.train]
    assert values == [0, 1, 12, 10, 21]
    check_labels(loaded.label_names, {0: "tench, Tinca tinca", 1: "goldfish", 2: "great white shark"})
    (tmp_path / "tars" / "classes.txt").unlink()
    loaded = load_data(DataRecipe(dataset=str(tmp_path / "tars")))
    assert loaded.label_names == ("0", "1", "2")
    check_labels(loaded.label_names, {0: "tench", 1: "goldfish", 2: "great white shark"})  # what bare numbers mean


def test_tar_members_are_never_unpickled_or_written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    planted = pickle.dumps(Planted(str(tmp_path / "planted")))
    write_tar(tmp_path / "d" / "train-0.tar", {"../../up": 0, "/abs/key": 1}, pth=planted, pyd=planted, json=b"{")
    with tarfile.open(tmp_path / "d" / "train-1.tar", "w") as shard:
        link = tarfile.TarInfo("z.png")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/hostname"
        shard.addfile(link)
    before = {path for path in tmp_path.rglob("*") if "cache" not in str(path)}
    loaded = load_data(DataRecipe(dataset=str(tmp_path / "d")))
    assert list(loaded.train["label"]) == [0, 1]
    assert {path for path in tmp_path.rglob("*") if "cache" not in str(path)} == before
    assert WebDataset.DECODERS["json"]("[1]") == [1]  # as it was for everybody else


class Planted:
    """Writes a file when it is unpickled."""

    def __init__(self, path: str):
        self.path = path

    def __reduce__(self):
        return Path.touch, (Path(self.path),)


def test_unknown_tar_members_list_the_columns(tmp_path):
    write_tar(tmp_path / "train-0.tar", {"a": 0}, ending="picture")
    message = message_of(DataRecipe(dataset=str(tmp_path)))
    assert (
        "data.image_column: split 'train'" in message
        and "'image'; its columns are __key__, __url__, picture, cls" in message
    )
    loaded = load_data(DataRecipe(dataset=str(tmp_path), image_column="picture"))
    assert loaded.train[0]["image"].size == (6, 5)
    (tmp_path / "train-0.tar").write_bytes(b"no archive")
    assert "cannot be opened" in message_of(DataRecipe(dataset=str(tmp_path)))


def test_too_short_class_list_raises(tmp_path):
    write_tar(tmp_path / "train-0.tar", {"a": 0, "b": 3})
    (tmp_path / "classes.txt").write_text("cat\ndog\n")
    message = message_of(DataRecipe(dataset=str(tmp_path)))
    assert "classes.txt names 2 classes, but the labels of split 'train' range from 0 to 3" in message


def test_dense_whole_numbers_become_classes(tmp_path):
    recipe = save_splits(
        tmp_path,
        train=make_split([2, 0, 1], datasets.Value("int64")),
        validation=make_split([1, 1], datasets.Value("int64")),
    )
    loaded = load_data(recipe)
    assert loaded.label_names == ("0", "1", "2")
    assert loaded.evaluation.features["label"].names == ["0", "1", "2"]


def test_other_columns_are_renamed_and_dropped(tmp_path):
    split = make_split([0, 1], column="species").rename_column("image", "photo").add_column("id", [7, 8])
    recipe = save_splits(tmp_path, train=split)
    loaded = load_data(DataRecipe(dataset=recipe.dataset, image_column="photo", label_column="species"))
    assert loaded.train.column_names == ["image", "label"]


def test_images_as_plain_bytes_are_decoded(tmp_path):
    split = make_split([0, 1]).cast_column("image", datasets.Image(decode=False))
    plain = datasets.Features({"image": {"bytes": datasets.Value("binary"), "path": datasets.Value("string")}})
    plain["label"] = split.features["label"]
    loaded = load_data(save_splits(tmp_path / "struct", train=split.cast(plain)))
    assert loaded.train[1]["image"].getpixel((0, 0)) == (1, 1, 1)
    loaded = load_data(save_splits(tmp_path / "undecoded", train=split))
    assert loaded.train[1]["image"].getpixel((0, 0)) == (1, 1, 1)


def test_the_fingerprint_follows_the_labels(tmp_path):
    first = load_data(save_splits(tmp_path / "a", train=make_split([0, 1])))
    same = load_data(save_splits(tmp_path / "b", train=make_split([0, 1])))
    other = load_data(save_splits(tmp_path / "c", train=make_split([1, 0])))
    assert first.fingerprint == same.fingerprint != other.fingerprint


def test_errors_say_what_is_wrong_with_the_place(tmp_path, monkeypatch):
    assert "data.dataset is not set" in message_of(DataRecipe())

    def no_network(*args: object, **kwargs: object) -> None:
        raise ConnectionError("Couldn't reach 'some/where' on the Hub\nsecond line")

    monkeypatch.setattr(opening_module, "load_dataset", no_network)
    message = message_of(DataRecipe(dataset="some/where"))
    assert (
        "'some/where' cannot be opened (Couldn't reach 'some/where' on the Hub)" in message
        and "the id of a Hub data set" in message
    )
    assert "no parquet, no tar files and no split folders" in message_of(DataRecipe(dataset=str(tmp_path)))


def test_a_folder_with_other_splits_lists_them(tmp_path):
    message = message_of(DataRecipe(dataset=str(write_folder(tmp_path, {"a": SYNSETS, "b": SYNSETS}))))
    assert "neither the split 'train' nor 'validation', it has a, b; set data.train_split" in message


def test_a_missing_column_lists_those_that_are_there(tmp_path):
    recipe = save_splits(tmp_path, train=make_split([0]))
    message = message_of(DataRecipe(dataset=recipe.dataset, label_column="fine"))
    assert (
        message.startswith("data.label_column: split 'train'")
        and "no column 'fine'; its columns are image, label" in message
    )
    message = message_of(DataRecipe(dataset=recipe.dataset, image_column="img"))
    assert message.startswith("data.image_column") and "no column 'img'" in message


def test_column_without_images_raises(tmp_path):
    recipe = save_splits(tmp_path, train=make_split([0]))
    assert "must contain images" in message_of(DataRecipe(dataset=recipe.dataset, image_column="label"))


def test_empty_split_raises(tmp_path):
    make_split([]).to_parquet(tmp_path / "train.parquet")
    message = message_of(DataRecipe(dataset=str(tmp_path)))
    assert 'cannot be opened (Instruction "train" corresponds to no data!)' in message


@pytest.mark.parametrize(
    ("labels", "kind", "got"),
    [([0.5, 1.5], "float32", "got Value('float32')"), ([0, 2], "int64", "got 0, 2"), ([-1, 0], "int64", "got -1, 0")],
)
def test_labels_that_are_not_classes_raise(tmp_path, labels, kind, got):
    message = message_of(save_splits(tmp_path, train=make_split(labels, datasets.Value(kind))))
    assert "must contain class labels, text or the whole numbers 0 to n-1" in message and got in message


def test_images_without_a_label_raise(tmp_path):
    message = message_of(save_splits(tmp_path, train=make_split([0, -1, None])))
    assert "2 of 3 images of split 'train' have no label" in message


def test_splits_with_different_classes_raise(tmp_path):
    folder = write_folder(tmp_path, {"train": ("cat", "dog"), "val": ("cat", "owl")})
    message = message_of(DataRecipe(dataset=str(folder)))
    assert "the classes of 'train' and 'val' differ: cat, dog and cat, owl" in message


def test_labels_that_agree_are_accepted():
    check_labels(["cat", "dog"], {0: "LABEL_0", 1: "LABEL_1"})
    check_labels(["cat", "dog"], {0: "0", 1: "1"})
    check_labels(["Great_White", "dog"], {0: "great white, white shark", 1: "dog, domestic dog"})
    check_labels(SYNSETS, dict(enumerate(SYNSETS)))
    check_labels(SYNSETS, {0: "tench, Tinca tinca", 1: "goldfish", 2: "great white shark"})
    names = [f"class {index}" for index in range(10)]
    check_labels(names, dict(enumerate(["renamed", *names[1:]])))


def test_another_number_of_classes_offers_a_new_head():
    with pytest.raises(
        DatasetError,
        match=r"2 classes \(x, y\), .* 3 \(a, b, c\); .*--prune\.num_labels data.*evaluate: `--num_labels data",
    ):
        check_labels(["x", "y"], {0: "a", 1: "b", 2: "c"})


def test_another_order_names_the_first_differences():
    names = [f"class {index}" for index in range(30)]
    swapped = [*names[:3], names[4], names[3], *names[5:]]
    with pytest.raises(DatasetError, match=r"2 of 30 .*index 3: .*'class 4'.*'class 3'; index 4"):
        check_labels(swapped, dict(enumerate(names)))


def test_more_than_a_tenth_of_other_names_raises():
    names = [f"class {index}" for index in range(10)]
    with pytest.raises(DatasetError, match=r"2 of 10 .*index 0: .*'x'.*'class 0'"):
        check_labels(["x", "y", *names[2:]], dict(enumerate(names)))


def test_ranks_share_one_calibration_sample():
    split = make_split([index % 3 for index in range(20)])
    ids = calibration_ids(20, batches=5, batch_size=3, seed=1)
    assert len(set(ids)) == 15 and ids == calibration_ids(20, batches=5, batch_size=3, seed=1)
    assert ids != calibration_ids(20, batches=5, batch_size=3, seed=2)

    def load(rank: int, world: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
        options, ranks = LoaderOptions(batch_size=3), Ranks(rank, world)
        return list(CalibrationBatches(split, PROCESSOR, options, batches=5, seed=1, ranks=ranks))

    alone, shards = load(0, 1), [load(rank, 3) for rank in range(3)]
    assert [len(shard) for shard in shards] == [2, 2, 1]
    for number, (pixel_values, labels) in enumerate(alone):
        assert pixel_values.shape == (3, 3, 4, 4) and pixel_values.dtype == torch.float32
        assert labels.tolist() == [index % 3 for index in ids[3 * number : 3 * number + 3]]
        assert torch.equal(pixel_values, shards[number % 3][number // 3][0])


def test_a_small_split_gives_a_partial_micro_batch():
    split = make_split([0, 1, 2, 0, 1])
    batches = CalibrationBatches(split, PROCESSOR, LoaderOptions(batch_size=2), batches=9, seed=0)
    sizes = [len(labels) for _, labels in batches]
    assert sizes == [2, 2, 1]


@pytest.mark.parametrize("workers", [0, 2])
def test_the_evaluation_shards_are_strided_and_complete(workers):
    split = make_split([0, 1, 2, 0, 1, 2, 0])
    options = LoaderOptions(batch_size=2, num_workers=workers)
    shards = [list(eval_loader(split, PROCESSOR, options, Ranks(rank, world=3))) for rank in range(3)]
    assert [torch.cat([batch[0] for batch in shard]).tolist() for shard in shards] == [[0, 3, 6], [1, 4], [2, 5]]
    positions, pixels, labels, is_replacement = shards[0][1]
    assert is_replacement.dtype == torch.bool and shards[0][1].broken == []
    assert positions.dtype == labels.dtype == torch.int64 and labels.tolist() == [0]
    assert torch.equal(normalised(pixels, PROCESSOR), PROCESSOR([make_image(6)], return_tensors="pt")["pixel_values"])


class DrawnTransform:
    """Returns a random number instead of an image."""

    def __call__(self, image: Image.Image) -> torch.Tensor:
        return torch.rand(())


def test_a_rank_without_images_gets_no_batches():
    loader = eval_loader(make_split([0]), PROCESSOR, LoaderOptions(batch_size=2), Ranks(rank=1, world=2))
    assert list(loader) == []


def test_ranks_and_accumulation_share_one_epoch_order():
    split, transform = make_split([index % 3 for index in range(11)]), EvaluationTransform(PROCESSOR)

    def load(rank: int, world: int, micro: int, epoch: int = 1) -> list[list[int]]:
        order = EpochOrder(seed=0, epoch=epoch, parts=4 // micro)
        batches = train_batches(split, transform, order, LoaderOptions(batch_size=4), Ranks(rank, world))
        assert batches.totals == [4, 4] and batches.sizes == [micro] * (8 // micro // world)
        return [batch[0].tolist() for batch in batches.loader]

    alone = load(0, 1, 4)
    assert [len(batch) for batch in alone] == [4, 4] and len({*alone[0], *alone[1]}) == 8
    first, second = load(0, 2, 1), load(1, 2, 1)
    assert [first[0] + second[0] + first[1] + second[1], first[2] + second[2] + first[3] + second[3]] == alone
    assert load(0, 1, 4, epoch=2) != alone


def test_copies_are_augmented_differently_in_different_parts():
    def load(*, parts: int = 2, **changes: Any) -> list[tuple[list[int], list[float]]]:
        order = EpochOrder(seed=0, epoch=1, parts=parts, **changes)
        batches = train_batches(make_split([0] * 12), DrawnTransform(), order, LoaderOptions(batch_size=8))
        return [(batch.positions.tolist(), batch.pixels.tolist()) for batch in batches.loader]

    parts = load(repeats=2, drop_last=False)
    assert [len(positions) for positions, _ in parts] == [4, 4, 2, 2]
    assert parts[0][0] == parts[1][0] and len(set(parts[0][0])) == 4  # each image once in each part
    assert not set(parts[0][1]) & set(parts[1][1])
    assert len({*parts[0][0], *parts[2][0]}) == 6  # half of the images
    first = dict(zip(*load(parts=1)[0], strict=True))
    both = dict(zip(*parts[0], strict=True))
    shared = set(first) & set(both)
    assert shared and all(first[position] == both[position] for position in shared)  # the first copy as without copies


def test_short_last_batch_has_equal_parts_per_rank():
    split, transform = make_split([0] * 9), EvaluationTransform(PROCESSOR)
    order, options = EpochOrder(seed=0, epoch=1, parts=4, drop_last=False), LoaderOptions(batch_size=8)
    ranks = [train_batches(split, transform, order, options, Ranks(rank, world=2)) for rank in range(2)]
    assert [batches.totals for batches in ranks] == [[8, 1]] * 2
    assert [batches.sizes for batches in ranks] == [[2, 2, 0, 0], [2, 2, 0, 1]]
    shares = [zip(batches.loader, batches.sizes, strict=True) for batches in ranks]
    seen = [batch[0].tolist() for share in shares for batch, size in share if size]
    assert sorted(position for batch in seen for position in batch) == list(range(9))


def test_loading_leaves_the_global_generator_alone():
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    list(eval_loader(make_split([0, 1]), PROCESSOR, LoaderOptions(batch_size=1)))
    assert torch.equal(torch.rand(3), expected)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("content", [b"", b"no image", None])
def test_damaged_image_is_named_by_its_file(content, workers, tmp_path):
    root = write_folder(tmp_path / "images", {"train": ("a", "b"), "val": ("a", "b")})
    damaged = root / "val" / "b" / "test-1.PNG"
    damaged.write_bytes(damaged.read_bytes()[:40] if content is None else content)
    split = load_data(DataRecipe(dataset=str(root))).evaluation
    with pytest.raises(DatasetError) as caught:
        list(eval_loader(split, PROCESSOR, LoaderOptions(batch_size=1, num_workers=workers)))
    assert str(caught.value).startswith(f"data: {damaged} cannot be read (")
    assert str(caught.value).endswith("data.broken: skip") and "\n" not in str(caught.value)
    assert multiprocessing.active_children() == []


def test_damaged_image_without_file_is_named_by_position():
    split = datasets.Dataset.from_dict(
        {"image": [{"bytes": b"no image", "path": None}], "label": [0]},
        features=datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["a"])}),
    )
    with pytest.raises(DatasetError, match="data: image 0 "):
        list(eval_loader(split, PROCESSOR, LoaderOptions(batch_size=1)))
