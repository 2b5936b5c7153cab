"""All kinds of data give the same scores as the tuples that they hold."""

import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from datasets import ClassLabel, Dataset, Features, Image
from PIL import Image as PilImage
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from isoprune_hf import DataRecipe, IsoImageProcessor, finetune, prune
from isoprune_hf.errors import RecipeError

IMAGES = torch.randn(10, 3, 6, 6, generator=torch.Generator().manual_seed(0))
LABELS = torch.tensor([0, 1, 2, 3, 0, 1, 2, 3, 0, 1])


def make_net(classes: int = 4) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, classes))


def scores(data: Any, **settings: Any) -> Tensor:
    settings = {"criterion": "taylor", "round_to": 1, **settings}
    return prune(make_net(), data, **settings).scores.scores["0"]


def batches() -> Iterator[tuple[Tensor, Tensor]]:
    yield IMAGES[:6], LABELS[:6]
    yield IMAGES[6:], LABELS[6:]


def rows() -> Dataset:
    return Dataset.from_dict({"pixel_values": IMAGES.tolist(), "labels": LABELS.tolist()}).with_format("torch")


KINDS: dict[str, Callable[[], Any]] = {
    "generator": batches,
    "lists": lambda: [list(batch) for batch in batches()],
    "dicts": lambda: [{"pixel_values": images, "labels": labels} for images, labels in batches()],
    "dicts of another name": lambda: [{"label": labels, "image": images} for images, labels in batches()],
    "loader": lambda: DataLoader(TensorDataset(IMAGES, LABELS), 4),
    "torch data set": lambda: TensorDataset(IMAGES, LABELS),
    "rows": rows,
    "shuffled loader": lambda: DataLoader(TensorDataset(IMAGES, LABELS), 4, shuffle=True),
}


@pytest.mark.parametrize("kind", KINDS)
def test_kind_gives_the_scores_of_tuples(kind: str) -> None:
    torch.testing.assert_close(scores(KINDS[kind]()), scores(list(batches())))


def test_only_the_wanted_samples_are_read() -> None:
    read: list[int] = []

    def counted() -> Iterator[tuple[Tensor, Tensor]]:
        for number in range(10):
            read.append(number)
            yield IMAGES[number : number + 1], LABELS[number : number + 1]

    found = scores(counted(), batch_size=3, calibration_batches=2)
    assert read == [0, 1, 2, 3, 4, 5]
    torch.testing.assert_close(found, scores([(IMAGES[:6], LABELS[:6])]))
    torch.testing.assert_close(scores([(IMAGES, LABELS)], batch_size=3, calibration_batches=2), found)


def test_shuffled_loader_leaves_random_states() -> None:
    random.seed(3)
    np.random.seed(3)
    torch.manual_seed(3)
    expected = random.random(), np.random.rand(), torch.rand(1).item()
    random.seed(3)
    np.random.seed(3)
    torch.manual_seed(3)

    class Drawing(TensorDataset):
        def __getitem__(self, index: int) -> Any:
            _ = random.random(), np.random.rand(), torch.rand(1)
            return super().__getitem__(index)

    net, loader = nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 4)), Drawing(torch.randn(9, 3), LABELS[:9])
    random.seed(3)
    np.random.seed(3)
    torch.manual_seed(3)
    prune(net, DataLoader(loader, 4, shuffle=True), round_to=1)
    assert (random.random(), np.random.rand(), torch.rand(1).item()) == expected


def photos() -> Dataset:
    generator = np.random.default_rng(0)
    images = [PilImage.fromarray(generator.integers(0, 256, (40, 48, 3), dtype=np.uint8)) for _ in range(6)]
    features = Features({"image": Image(), "label": ClassLabel(names=["a", "b"])})
    return Dataset.from_dict({"image": images, "label": [0, 1] * 3}, features=features)


@pytest.mark.families
def test_photos_need_the_processor_of_the_base() -> None:
    module = timm.create_model("test_resnet", num_classes=2)
    result = prune(module, photos(), ratio=0.5, criterion="taylor", round_to=2)
    assert result.config.image_size == [3, 160, 160]
    assert result.processor.crop_size == {"height": 160, "width": 160}
    with pytest.raises(RecipeError, match="processor"):
        prune(make_net(), photos())


@pytest.mark.families
def test_name_of_a_data_set_is_opened() -> None:
    settings = {"pretrained": False, "num_labels": 10, "criterion": "taylor", "ratio": 0.5, "round_to": 2}
    settings |= {"batch_size": 4, "calibration_batches": 1}
    named = prune("timm/test_resnet", "digits", **settings)
    by_recipe = prune("timm/test_resnet", DataRecipe(dataset="digits"), **settings)
    assert named.plan.kept == by_recipe.plan.kept
    assert named.config.num_labels == 10


def test_folder_of_images_is_opened(tmp_path: Path) -> None:
    for split in ("train", "val"):
        for number, photo in enumerate(photos()["image"]):
            folder = tmp_path / split / "ab"[number % 2]
            folder.mkdir(parents=True, exist_ok=True)
            photo.save(folder / f"{number}.png")
    module = timm.create_model("test_resnet", num_classes=2)
    result = prune(module, tmp_path, ratio=0.5, criterion="taylor", round_to=2)
    assert result.loss == "cross_entropy"


def test_rows_without_images_are_refused() -> None:
    rows = Dataset.from_dict({"text": ["a"], "label": [0]})
    with pytest.raises(ValueError, match="image"):
        prune(timm.create_model("test_resnet", num_classes=2), rows)


def test_transform_of_a_recipe_makes_the_inputs() -> None:
    side = {"height": 8, "width": 8}
    processor = IsoImageProcessor(size=side, crop_size=side, image_mean=[0.5] * 3, image_std=[0.5] * 3)
    settings: dict[str, Any] = {"processor": processor, "calibration_batches": 1, "batch_size": 8}
    found = {
        name: prune(make_net(10), DataRecipe(dataset="digits", **options), criterion="taylor", ratio=0.5, **settings)
        for name, options in {"own": {}, "mean": {"mean": [0.1] * 3}}.items()
    }
    assert [list(result.processor.image_mean) for result in found.values()] == [[0.5] * 3, [0.1] * 3]
    assert [result.plan.settings.get("transform") for result in found.values()] == [None, {"mean": [0.1] * 3}]
    assert not torch.equal(found["own"].scores.scores["0"], found["mean"].scores.scores["0"])
    given: list[Any] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("isoprune_hf.training.finetune.finetune", lambda *args, **_: given.append(args[2]) or {})
        finetune(found["own"], DataRecipe(dataset="digits", mean=[0.2] * 3))
    assert list(given[0].image_mean) == [0.2] * 3
    with pytest.raises(RecipeError, match="interpolation"):
        scores([(IMAGES, LABELS)], interpolation="nearest")
