"""Models of grey images and of four or six channels pass through every stage, and read the same pixels in each."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import datasets
import numpy as np
import onnxruntime
import pytest
import torch
from datasets import Array3D, ClassLabel, Dataset, Features
from helpers.command_line import isoprune, read, refuse
from helpers.fresh_python import FreshPython
from helpers.marks import one_of_each
from helpers.tiny_models import VIT
from PIL import Image
from torch import Tensor
from torchvision.transforms.v2 import functional
from transformers import ViTConfig, pipeline

from isoprune_hf import load_base
from isoprune_hf.data.augmentation import train_transform
from isoprune_hf.data.dataset import load_data, with_encoded_images
from isoprune_hf.data.decoding import read_image
from isoprune_hf.data.loading import CalibrationBatches, LoaderOptions, calibration_ids, eval_loader
from isoprune_hf.data.pixels import normalised
from isoprune_hf.recipes import DataRecipe, FinetuneRecipe

CLASSES, SIDE = ("dark", "light", "mixed"), 24
GREY_VIT = {"image_size": 16, "patch_size": 4, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
SMALL = ["--prune.target_macs", "70%", "--prune.round_to", "1", "--prune.batch_size", "6", "--finetune.epochs", "1"]
SMALL += ["--prune.calibration_batches", "2", "--finetune.batch_size", "6", "--finetune.crop_scale", "[0.5,1]"]


class Road(NamedTuple):
    """The results of a pipeline: number of channels, images, and folder of the model."""

    channels: int
    images: Path
    folder: Path


def draw(channels: int, count: int) -> np.ndarray:
    """Draw images (count, SIDE, SIDE, channels) of uint8, of which no two are alike."""
    return np.random.default_rng(channels).integers(0, 256, (count, SIDE, SIDE, channels), dtype=np.uint8)


def write_files(root: Path, channels: int) -> Path:
    """Write PNG files in grey or RGBA."""
    for split in ("train", "val"):
        for number, pixels in enumerate(draw(channels, 12)):
            folder = root / split / CLASSES[number % 3]
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels[..., 0] if channels == 1 else pixels).save(folder / f"{number:02d}.png")
    return root


def write_arrays(root: Path, channels: int) -> Path:
    """Write parquet files with a column of arrays (height, width, channels)."""
    root.mkdir()
    features = Features({"image": Array3D((SIDE, SIDE, channels), "uint8"), "label": ClassLabel(names=[*CLASSES])})
    rows = {"image": list(draw(channels, 12)), "label": [number % 3 for number in range(12)]}
    for split in ("train", "validation"):
        Dataset.from_dict(rows, features=features).to_parquet(root / f"{split}-0.parquet")
    return root


def expected_pixels(base: Any, images: np.ndarray) -> Tensor:
    """Compute the pixel values of images (B, H, W, C) by hand: each channel is an image of its own."""
    size, mean, std = base.model.config.image_size, base.processor.image_mean, base.processor.image_std
    resized = [
        [
            np.asarray(Image.fromarray(channel).resize(size[1:], Image.Resampling(base.processor.resample)))
            for channel in image.transpose(2, 0, 1)
        ]
        for image in images
    ]
    return functional.normalize(torch.from_numpy(np.array(resized)).float() / 255, list(mean), list(std))


@pytest.fixture(scope="module", autouse=True)
def without_bars() -> Iterator[None]:
    datasets.disable_progress_bars()  # the command line switches them off before it imports the library
    yield
    datasets.enable_progress_bars()


@pytest.fixture(
    scope="module",
    params=[
        pytest.param("grey-transformers", marks=pytest.mark.faults),
        *one_of_each(["six", "grey", "rgba"], "grey", mark="faults"),
    ],
)
def road(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Road:
    """Run the whole pipeline with the default preset, and return its results."""
    root = tmp_path_factory.mktemp(request.param)
    channels = {"rgba": 4, "six": 6}.get(request.param, 1)
    images = (write_arrays if channels == 6 else write_files)(root / "images", channels)
    model = ["--prune.model", "timm/vit_tiny_patch16_224", "--prune.model_args"]
    model.append(json.dumps({**VIT, "in_chans": channels}))
    if request.param == "grey-transformers":
        ViTConfig(num_channels=1, intermediate_size=64, **GREY_VIT).save_pretrained(root / "base")
        model = ["--prune.model", str(root / "base")]
    data = ["--prune.pretrained", "false", "--prune.num_labels", "data", "--data.dataset", str(images)]
    done = isoprune("run", *model, *data, *SMALL, "--output", root / "out")
    assert done.code == 0, done.err
    assert "pipeline on a held-out image" in done.out
    return Road(channels, images, root / "out" / "model")


def test_every_stage_reads_the_same_pixels(road: Road) -> None:
    base = load_base(str(road.folder))
    assert base.model.config.image_size == [road.channels, 16, 16]
    images = load_data(DataRecipe(dataset=str(road.images)))
    options = LoaderOptions(batch_size=12, decoding=images.decoding)
    (batch,) = eval_loader(images.evaluation, base.processor, options)
    drawn = draw(road.channels, 12)
    in_folders = np.argsort([number % 3 for number in range(12)], kind="stable")
    expected = expected_pixels(base, drawn if road.channels == 6 else drawn[in_folders])
    found = normalised(batch.pixels, base.processor)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)
    calibrated = CalibrationBatches(images.evaluation, base.processor, options, batches=1, seed=0)
    (pixels, _), order = next(iter(calibrated)), calibration_ids(12, batches=1, batch_size=12, seed=0)
    assert torch.equal(pixels, found[order])
    trained = train_transform(base.processor, FinetuneRecipe(crop_scale=(1.0, 1.0), hflip=0.0))
    decoding = options.for_processor(base.processor).decoding
    rows = with_encoded_images(images.evaluation)
    assert torch.equal(trained(read_image(rows, 0, decoding).image), found[0])


def test_pipeline_answers_like_the_evaluation(road: Road) -> None:
    base, images = load_base(str(road.folder)), load_data(DataRecipe(dataset=str(road.images)))
    (batch,) = eval_loader(images.evaluation, base.processor, LoaderOptions(batch_size=12))
    with torch.no_grad():
        expected = base.model(normalised(batch.pixels[:1], base.processor)).logits.softmax(-1)[0]
    row = images.evaluation[0]["image"]
    array = np.asarray(row, np.uint8)
    asked = [array[None] if road.channels == 1 else array, *([row] if road.channels == 1 else [])]
    classify = pipeline("image-classification", model=str(road.folder))
    for image in asked:  # an array, and where a pipeline can, the image itself
        found = {entry["label"]: entry["score"] for entry in classify(image)}
        torch.testing.assert_close(torch.tensor([found[name] for name in CLASSES]), expected, rtol=0, atol=1e-6)


def test_shipped_code_classifies_without_the_package(road: Road, fresh_python: FreshPython, tmp_path: Path) -> None:
    base = load_base(str(road.folder))
    array = draw(road.channels, 1)[0]
    np.save(tmp_path / "image.npy", array)
    with torch.no_grad():
        pixels = base.processor(array, return_tensors="pt").pixel_values
        best = base.model.config.id2label[base.model(pixels).logits.argmax().item()]
    code = """
import sys, numpy
from transformers import pipeline
classify = pipeline("image-classification", model=sys.argv[1], trust_remote_code=True)
print(classify(numpy.load(sys.argv[2]))[0]["label"])
"""
    done = fresh_python.run(code, road.folder, tmp_path / "image.npy", absent=["isoprune_hf"])
    assert (done.returncode, done.stdout.strip()) == (0, best), done.stderr


@pytest.mark.families
def test_evaluate_export_and_inspect_run(road: Road, tmp_path: Path) -> None:
    metrics = read(road.folder, "metrics.json")["finetuned"]
    evaluated = isoprune("evaluate", "--model", road.folder, "--data.dataset", road.images, "--json")
    figures = json.loads(evaluated.out)
    assert [figures[name] for name in ("top1", "images")] == [metrics[name] for name in ("top1", "images")]
    assert figures["loss"] == pytest.approx(metrics["loss"], rel=1e-6)
    assert isoprune("export", road.folder, "--output", tmp_path / "onnx").code == 0
    session = onnxruntime.InferenceSession(tmp_path / "onnx" / "model.onnx", providers=["CPUExecutionProvider"])
    assert session.get_inputs()[0].shape[1:] == [road.channels, 16, 16]
    listed = isoprune("inspect", road.folder, "--prune.criterion", "l1", "--prune.target_macs", "80%")
    assert listed.code == 0, listed.err
    card = (road.folder / "README.md").read_text(encoding="utf-8")
    assert f"Input: images of {road.channels} " in card
    assert ('classify("image.png")' in card) == (road.channels == 1)
    assert ('classify(numpy.load("image.npy"))' in card) == (road.channels != 1)


def test_images_without_these_channels_are_refused(road: Road, tmp_path: Path) -> None:
    if road.channels == 1:
        images, found = write_arrays(tmp_path / "images", 6), "array of shape [24, 24, 6]"
    else:
        images, found = write_files(tmp_path / "images", 1), "this one has 1 (L)"
    for policy in ("error", "skip", "grey"):
        line = refuse("evaluate", "--model", road.folder, "--data.dataset", images, "--data.broken", policy)
        assert f"the model reads images of {road.channels} channels" in line and found in line
