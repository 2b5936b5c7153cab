import functools
import json
import logging
import os
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from accelerate import Accelerator
from helpers.evaluation import make_net, make_processor
from helpers.images import BROKEN, encode, noise, open_images, with_orientation, write_images
from helpers.ranks import call_on_ranks
from PIL import Image
from transformers.image_utils import load_image

from isoprune_hf.checkpoint.modeling_isoprune import IsoImageProcessor
from isoprune_hf.data.augmentation import TransformedImages
from isoprune_hf.data.dataset import ImageData, load_data
from isoprune_hf.data.decoding import Decoding, decode_image, decode_pixels, read_image, read_or_replace
from isoprune_hf.data.fingerprint import fingerprint_images
from isoprune_hf.data.image_folders import holds_images
from isoprune_hf.data.loading import CalibrationBatches, LoaderOptions
from isoprune_hf.errors import DatasetError
from isoprune_hf.evaluation.evaluate import evaluate_model
from isoprune_hf.recipes import DataRecipe, FinetuneRecipe
from isoprune_hf.training.finetune import finetune

RED, GREEN = (255, 0, 0), (0, 255, 0)


@pytest.mark.parametrize("kind", BROKEN)
def test_broken_image_is_a_one_line_error(kind: str, tmp_path: Path) -> None:
    content, reason = BROKEN[kind]
    (tmp_path / "a.jpg").write_bytes(content)
    split = [{"image": {"path": str(tmp_path / "a.jpg"), "bytes": None}, "label": 0}]
    with pytest.raises(DatasetError, match=reason) as caught:
        TransformedImages(split, lambda image: image)[0]
    assert str(caught.value).startswith(f"data: {tmp_path / 'a.jpg'} cannot be read (")
    assert "\n" not in str(caught.value) and "0x" not in str(caught.value)


def test_missing_file_and_missing_image_are_named() -> None:
    split = [{"image": {"path": "/no/such.jpg", "bytes": None}, "label": 0}, {"image": None, "label": 0}]
    images = TransformedImages(split, lambda image: image)
    with pytest.raises(DatasetError, match=r"data: /no/such\.jpg .*No such file"):
        images[0]
    with pytest.raises(DatasetError, match=r"data: image 1 .*missing"):
        images[1]


@pytest.mark.parametrize("kind", ["pipe", "device", "folder"])
def test_image_that_never_ends_is_refused(kind: str, tmp_path: Path) -> None:
    """By all that read image files: the loader, the fingerprint of a split, and the search for images."""
    file = tmp_path / "0"
    if kind == "pipe":
        os.mkfifo(file)
    elif kind == "device":
        file.symlink_to("/dev/zero")
    else:
        file.mkdir()
    rows = [{"image": {"path": str(file), "bytes": None}, "label": 0}]
    with pytest.raises(DatasetError, match="cannot be read"):
        TransformedImages(rows, lambda image: image)[0]
    encoded = datasets.Features({"image": datasets.Image(decode=False), "label": datasets.Value("int64")})
    split = datasets.Dataset.from_dict({"image": [str(file)], "label": [0]}, features=encoded)
    assert fingerprint_images(split, ["a"])
    assert not holds_images(tmp_path)


LONG = Image.new("L", (60_000, 1))


@pytest.mark.parametrize(
    "image",
    [{"path": None, "bytes": encode(LONG)}, LONG, np.zeros((1, 60_000, 3), np.uint8)],
    ids=["file", "image", "array"],
)
@pytest.mark.parametrize("decoder", ["pil", "torchvision"])
def test_image_too_long_for_its_resize_is_refused(image: Any, decoder: str) -> None:
    """256 x 15,360,000 pixels after the resize; at the limit, 1 x 1024 pixels become 256 x 262,144."""
    decoding = Decoding(decoder=decoder).for_processor(IsoImageProcessor(size={"shortest_edge": 256}))
    split = [{"image": image, "label": 0}]
    with pytest.raises(DatasetError, match=r"60000 x 1 pixels, 3,932,160,000 after the resize"):
        read_image(split, 0, decoding)
    assert read_image(split, 0, Decoding(decoder=decoder)).label == 0
    at_limit = [{"image": Image.new("L", (1024, 1)), "label": 0}]
    assert read_image(at_limit, 0, decoding).label == 0


def test_policy_replaces_an_image_too_long() -> None:
    split = [{"image": {"path": None, "bytes": encode(LONG)}, "label": 0}]
    decoding = Decoding(broken="grey").for_processor(IsoImageProcessor(size={"shortest_edge": 256}))
    assert read_or_replace(split, 0, decoding).is_replacement


@pytest.mark.parametrize(
    ("settings", "edge"),
    [
        ({"size": {"shortest_edge": 40}}, 40),
        ({"size": {"height": 40, "width": 30}}, None),
        ({"size": {"shortest_edge": 40, "longest_edge": 80}}, None),
        ({"size": {"shortest_edge": 40}, "do_resize": False}, None),
    ],
)
def test_decoding_knows_the_resize_of_a_processor(settings: dict[str, Any], edge: int | None) -> None:
    assert Decoding().for_processor(IsoImageProcessor(**settings)).edge == edge


def test_every_damage_is_caught() -> None:
    rng = np.random.default_rng(0)
    originals = [encode(noise(), kind) for kind in ("JPEG", "PNG", "GIF", "WEBP", "TIFF", "BMP")]
    read = 0
    for content in originals * 60:
        damaged = bytearray(content)
        for place in rng.integers(0, min(len(content), 400), 3):
            damaged[place] = rng.integers(0, 256)
        split = [{"image": {"path": None, "bytes": bytes(damaged)}, "label": 0}]
        image = TransformedImages(split, lambda image: image, decoding=Decoding(broken="grey"))[0][1]
        assert image.mode == "RGB"
        read += 1
    assert read == 360


def test_unusual_modes_become_rgb() -> None:
    def pixel(content: bytes) -> tuple[int, ...]:
        image = decode_image(content)
        assert image.mode == "RGB"
        return image.getpixel((0, 0))

    cmyk = Image.new("CMYK", (8, 8), (0, 255, 255, 0))  # no cyan, all magenta and yellow: red
    red, green, blue = pixel(encode(cmyk, "JPEG", quality=100))
    assert red > 250 and green < 5 and blue < 5
    palette = Image.new("P", (2, 1), 1)
    palette.putpalette([0, 0, 0, *RED])
    assert pixel(encode(palette, transparency=bytes([255, 0]))) == RED  # what is transparent keeps its colour
    assert pixel(encode(Image.fromarray(np.full((2, 2), 200 * 256 + 77, np.uint16)))) == (255, 255, 255)
    assert pixel(encode(Image.fromarray(np.full((2, 2), 77, np.uint16)))) == (77, 77, 77)
    assert pixel(encode(Image.new("L", (3, 3), 7))) == (7, 7, 7)
    assert pixel(encode(Image.new("LA", (3, 3), (9, 0)))) == (9, 9, 9)
    assert pixel(encode(Image.new("RGBA", (3, 3), (1, 2, 3, 0)))) == (1, 2, 3)
    assert pixel(encode(Image.new("1", (3, 3), 1))) == (255, 255, 255)
    frames = [Image.new("RGB", (4, 4), colour) for colour in (RED, GREEN)]
    assert pixel(encode(frames[0], "GIF", save_all=True, append_images=frames[1:])) == RED
    one = TransformedImages(
        [{"image": {"path": None, "bytes": encode(Image.new("RGB", (1, 1), GREEN))}, "label": 0}],
        lambda image: make_processor()(image, return_tensors="pt")["pixel_values"][0],
    )[0][1]
    assert one.shape == (3, 4, 4)


# Row and column of the stored pixel (0, 0) in the upright image of 2 x 3 pixels, for each value of the tag.
CORNERS = {1: (0, 0), 2: (0, -1), 3: (-1, -1), 4: (-1, 0), 5: (0, 0), 6: (0, -1), 7: (-1, -1), 8: (-1, 0)}


@pytest.mark.parametrize("value", CORNERS)
def test_exif_orientation_is_applied_unless_disabled(value: int) -> None:
    image = Image.new("RGB", (3, 2))
    image.putpixel((0, 0), RED)
    upright = np.asarray(decode_image(with_orientation(image, value)))
    assert upright.shape[:2] == ((2, 3) if value < 5 else (3, 2))
    assert tuple(upright[CORNERS[value]]) == RED and (upright.sum(axis=2) > 0).sum() == 1
    stored = np.asarray(decode_image(with_orientation(image, value), exif=False))
    assert np.array_equal(stored, np.asarray(image))


def test_skipped_image_is_replaced_by_the_next(tmp_path: Path) -> None:
    data = open_images(write_images(tmp_path / "images", {"train": {3, 4, 11}}), broken="skip")
    images = TransformedImages(data.train, np.asarray, decoding=data.decoding)
    rows = [images[at] for at in range(12)]
    assert [row.position for row in rows] == list(range(12))
    assert [row.position for row in rows if row.is_replacement] == [3, 4, 11]
    assert [row.label for row in rows] == [0, 0, 0, 1, 1, 1, 1, 1, 2, 2, 2, 0]  # with the label of the other image
    assert all(np.array_equal(rows[at][1], rows[other][1]) for at, other in ((3, 5), (4, 5), (11, 0)))


def test_grey_replacement_keeps_the_label(tmp_path: Path) -> None:
    data = open_images(write_images(tmp_path / "images", {"train": {3}}), broken="grey")
    sample = TransformedImages(data.train, np.asarray, decoding=data.decoding)[3]
    assert (sample.position, sample.label, sample.is_replacement) == (3, 0, True) and (sample.pixels == 128).all()


def test_skipping_ends_if_nothing_is_readable() -> None:
    split = [{"image": {"path": None, "bytes": b""}, "label": 0}] * 3
    with pytest.raises(DatasetError, match=r"data: image 1 .* images after it"):
        TransformedImages(split, np.asarray, decoding=Decoding(broken="skip"))[1]


def test_evaluation_reports_skipped_images(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    root = write_images(tmp_path / "images", {"val": {2, 7}})
    whole = open_images(write_images(tmp_path / "whole", {})).evaluation
    net, options = make_net(classes=3), {"batch_size": 5}
    with pytest.raises(DatasetError, match=r"val/class0/02\.png .*truncated"):
        evaluate_model(net, open_images(root).evaluation, make_processor(), **options)
    data = open_images(root, broken="skip")
    with caplog.at_level(logging.WARNING):
        figures = evaluate_model(net, data.evaluation, make_processor(), **options, decoding=data.decoding)
    rest = whole.select([at for at in range(12) if at not in (2, 7)])
    expected = {**evaluate_model(net, rest, make_processor(), **options), "broken": 2}
    assert figures == pytest.approx(expected, rel=1e-6)  # the batches differ in size
    assert figures["images"] == 10
    lines = [record.getMessage() for record in caplog.records]
    assert len(lines) == 2 and "val/class0/02.png cannot be read" in lines[0] and lines[0].endswith("left out")
    data = open_images(root, broken="grey")
    figures = evaluate_model(net, data.evaluation, make_processor(), **options, decoding=data.decoding)
    assert (figures["images"], figures["broken"]) == (12, 2)


def test_more_broken_images_than_allowed_are_an_error(tmp_path: Path) -> None:
    root = write_images(tmp_path / "images", {"train": {0, 5}, "val": {1, 2}})
    data = open_images(root, broken="skip", max_broken=1)
    message = r"data: 2 images of {} .*data\.max_broken 1"
    with pytest.raises(DatasetError, match=message.format("the evaluation")):
        evaluate_model(make_net(classes=3), data.evaluation, make_processor(), decoding=data.decoding)
    recipe = FinetuneRecipe(epochs=1, batch_size=4, distillation="none", crop_scale=(1.0, 1.0))
    only = ImageData(data.train, None, data.label_names, "images", "0", data.decoding)
    with pytest.raises(DatasetError, match=message.format("epoch 1")):
        finetune(make_net(classes=3), only, make_processor(), recipe, accelerator=Accelerator(cpu=True))
    options = LoaderOptions(batch_size=4, decoding=data.decoding)
    with pytest.raises(DatasetError, match=message.format("the calibration sample")):
        list(CalibrationBatches(data.train, make_processor(), options, batches=3, seed=0))


def test_calibration_replaces_and_names_a_broken_image(tmp_path, caplog) -> None:
    data = open_images(write_images(tmp_path / "images", {"train": {5}}), broken="skip")
    options = LoaderOptions(batch_size=4, decoding=data.decoding)
    batches = CalibrationBatches(data.train, make_processor(), options, batches=3, seed=0)
    with caplog.at_level(logging.WARNING):
        labels = torch.cat([labels for _, labels in batches])
    assert sorted(labels.tolist()) == [0] * 4 + [1] * 4 + [2] * 4
    assert [record.getMessage() for record in caplog.records if "class1/05.png cannot be read" in record.getMessage()]


def test_training_on_broken_images_uses_their_replacements(tmp_path: Path, caplog) -> None:
    broken = open_images(write_images(tmp_path / "images", {"train": {3, 8}}), broken="skip")
    mended = load_data(DataRecipe(dataset=str(write_images(tmp_path / "whole", {}))))
    order = [4 if at == 3 else 9 if at == 8 else at for at in range(12)]
    nets = []
    for train, decoding in ((broken.train, broken.decoding), (mended.train.select(order), mended.decoding)):
        data = ImageData(train, None, broken.label_names, "images", "0", decoding)
        net, recipe = make_net(classes=3), FinetuneRecipe(epochs=2, batch_size=4, distillation="none", hflip=0.5)
        with caplog.at_level(logging.WARNING):
            finetune(net, data, make_processor(), recipe, accelerator=Accelerator(cpu=True))
        nets.append(net)
    assert all(torch.equal(*pair) for pair in zip(*(net.state_dict().values() for net in nets), strict=True))
    lines = [record.getMessage() for record in caplog.records if "cannot be read" in record.getMessage()]
    assert len(lines) == 4 and "epoch 1: " in lines[0] and "train/class" in lines[0]


def train_on_ranks(accelerator: Accelerator, folder: Path) -> None:
    data = open_images(folder / "images", broken="skip")
    recipe = FinetuneRecipe(epochs=1, batch_size=4, virtual_replicas=2, distillation="none")
    net = make_net(classes=3)
    history = finetune(net, data, make_processor(), recipe, accelerator=accelerator)["history"]
    weights = {name: tensor.tolist() for name, tensor in net.state_dict().items()}
    name = f"{accelerator.num_processes}-{accelerator.process_index}.json"
    (folder / name).write_text(json.dumps([history[-1]["broken"], history[-1]["images"], weights]), encoding="utf-8")


def test_two_ranks_replace_broken_images_alike(tmp_path: Path) -> None:
    write_images(tmp_path / "images", {"train": {3, 8}, "val": {0, 1, 5}})
    call_on_ranks(functools.partial(train_on_ranks, folder=tmp_path), tmp_path / "log")
    train_on_ranks(Accelerator(cpu=True), tmp_path)
    alone, *ranks = (json.loads((tmp_path / f"{name}.json").read_text()) for name in ("1-0", "2-0", "2-1"))
    assert ranks[0] == ranks[1] and ranks[0][:2] == alone[:2] == [3, 9]
    for name, values in alone[2].items():
        np.testing.assert_allclose(values, ranks[0][2][name], rtol=1e-4, atol=1e-6)


def test_labels_beyond_the_classes_are_refused(tmp_path: Path) -> None:
    names = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["a", "b", "c"])})
    split = datasets.Dataset.from_dict({"image": [noise(), noise()], "label": [0, 2]}, features=names)
    split.info.features["label"] = datasets.ClassLabel(names=["a", "b"])  # as a file may say that others wrote
    datasets.DatasetDict(train=split).save_to_disk(str(tmp_path / "saved"))
    with pytest.raises(DatasetError, match=r"1 of 2 .*'train'"):
        load_data(DataRecipe(dataset=str(tmp_path / "saved")))


WIDE = np.arange(0, 65536, 1024, dtype=np.uint16).reshape(8, 8) // 16
KINDS = {
    "16-bit grey": encode(Image.fromarray(WIDE)),
    "16-bit TIFF": encode(Image.fromarray(WIDE), "TIFF"),
    "32-bit TIFF": encode(Image.fromarray(WIDE.astype(np.int32)), "TIFF"),
    "float TIFF": encode(Image.fromarray(WIDE.astype(np.float32)), "TIFF"),
    "grey and alpha": encode(noise(mode="LA")),
    "colour and alpha": encode(noise(mode="RGBA")),
    "CMYK": encode(noise(mode="CMYK"), "JPEG"),
    "palette": encode(noise().quantize(16)),
    "turned": with_orientation(noise(), 6),
}


@pytest.mark.parametrize("kind", KINDS)
def test_evaluation_sees_the_pixels_of_pipelines(kind: str, tmp_path: Path) -> None:
    (tmp_path / "image").write_bytes(KINDS[kind])
    expected = np.asarray(load_image(str(tmp_path / "image")))  # what a pipeline passes to its processor
    assert np.array_equal(np.asarray(decode_image(KINDS[kind])), expected)
    assert np.array_equal(decode_pixels(KINDS[kind]).permute(1, 2, 0), expected)


def test_wide_grey_is_said_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for split in ("train", "val"):
        (tmp_path / split / "a").mkdir(parents=True)
        (tmp_path / split / "a" / "0.png").write_bytes(KINDS["16-bit grey"])
    open_images(tmp_path)
    assert caplog.text.count("convert the files to 8 bits") == 1
