"""The CIFAR-10 nets of the accuracy benchmark: their sizes, and the road from a training to a measured cell."""

import shutil
from pathlib import Path

import pytest
import real_accuracy_data as data
import torch
from cifar_nets import train
from datasets import ClassLabel, Dataset, Features, Image
from PIL import Image as Pillow

from isoprune_hf.models import load_base
from isoprune_hf.pruning.cost.macs import count_cost

pytestmark = pytest.mark.benchmarks

CONVOLUTIONS = {16: 32 * 32, 32: 16 * 16, 64: 8 * 8}  # channels of a stage and its positions


@pytest.mark.parametrize(("name", "blocks"), [("resnet20", 3), ("resnet56", 9)])
def test_resnets_have_sizes_of_the_paper(name: str, blocks: int) -> None:
    macs, params, before = 3 * 9 * 16 * 32 * 32, 3 * 9 * 16 + 2 * 16, 16
    for channels, positions in CONVOLUTIONS.items():
        weights = 9 * before * channels + 9 * channels**2 * (2 * blocks - 1)
        norms = 2 * 2 * blocks * channels
        if before != channels:  # the shortcut
            weights, norms = weights + before * channels, norms + 2 * channels
        macs, params, before = macs + positions * weights, params + weights + norms, channels
    model = load_base(f"timm/cifar_{name}", pretrained=False).model
    assert sum(parameter.numel() for parameter in model.parameters()) == params + 64 * 10 + 10
    assert count_cost(model).macs == macs + 64 * 10


@pytest.mark.parametrize("name", ["vgg16_bn", "mobilenetv2", "vit"])
def test_other_nets_answer_small_images(name: str) -> None:
    model, processor = load_base(f"timm/cifar_{name}", pretrained=False)
    image = Pillow.new("RGB", (32, 32))
    assert model(**processor(image, return_tensors="pt")).logits.shape == (1, 10)


def write_images(folder: Path) -> None:
    features = Features({"img": Image(), "label": ClassLabel(names=list("abcdefghij"))})
    for split, count in (("train", 40), ("test", 20)):
        images = [Pillow.new("RGB", (32, 32), (6 * index, 0, 0)) for index in range(count)]
        rows = {"img": images, "label": [index % 10 for index in range(count)]}
        Dataset.from_dict(rows, features).to_parquet(folder / f"{split}-00000-of-00001.parquet")


def test_trained_net_is_opened_for_measuring(tmp_path: Path) -> None:
    images, output, weights = (tmp_path / name for name in ("images", "output", "weights"))
    for folder in (images, weights):
        folder.mkdir()
    write_images(images)
    short = ["--finetune.epochs", "1", "--finetune.batch_size", "20", "--finetune.evaluate_every", "1"]
    assert train("resnet20", images, output, short) == 0
    shutil.copy(output / "dense" / "model.safetensors", weights / "resnet20.safetensors")
    model, processor = data.open_net("resnet20", weights)
    photographs = data.open_photographs(images, processor, tmp_path / "pixels.npy")
    calibration, evaluated = photographs.split(0)
    assert photographs.labels[evaluated].tolist() == [*range(10), *range(10)]
    assert sorted(calibration.tolist()) == [*range(40)] and photographs.pixels.shape == (60, 3, 32, 32)
    trained = load_base(str(output / "dense")).model
    pixels = torch.from_numpy(photographs.pixels[evaluated.numpy()])
    assert torch.equal(model(pixel_values=pixels).logits, trained(pixel_values=pixels).logits)
    assert train("resnet20", images, tmp_path / "again", short, output / "dense") == 0
    assert not (tmp_path / "again" / "base").exists()  # no random weights


def test_missing_weights_name_the_training(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=r"cifar_nets\.py vit"):
        data.open_net("vit", tmp_path)
