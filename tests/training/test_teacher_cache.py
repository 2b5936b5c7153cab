"""The cache of teacher logits: which trainings share it, and that it contains the teacher's logits."""

import dataclasses
import functools
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from accelerate import Accelerator
from helpers.marks import one_of_each
from helpers.ranks import call_on_ranks
from helpers.training import TinyNet, assert_equal_weights, make_data, make_net, make_processor, make_recipe, train
from safetensors.torch import load_file

from isoprune_hf.data.augmentation import train_transform
from isoprune_hf.data.dataset import ImageData
from isoprune_hf.data.loading import LoaderOptions
from isoprune_hf.errors import CheckpointError, RecipeError
from isoprune_hf.recipes import FinetuneRecipe
from isoprune_hf.training import teacher_cache
from isoprune_hf.training.teacher import TeacherModel
from isoprune_hf.training.teacher_cache import CachedTeacher

FIXED = {"crop_scale": (1.0, 1.0), "hflip": 0.0}


@pytest.fixture(autouse=True)
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(teacher_cache, "_SHARD_IMAGES", 16)


def count_images(net: TinyNet) -> list[int]:
    seen: list[int] = []
    net.register_forward_hook(lambda module, args, kwargs, output: seen.append(len(output.logits)), with_kwargs=True)
    return seen


def open_cache(folder: Path, net: TinyNet, data: ImageData, **changes: Any) -> CachedTeacher:
    recipe = make_recipe(**{**FIXED, "teacher_cache": str(folder), **changes})
    transform = train_transform(make_processor(), recipe)
    options = LoaderOptions(batch_size=7, decoding=data.decoding)
    accelerator = Accelerator(cpu=True)
    return CachedTeacher(TeacherModel(net), data, transform, make_processor(), recipe, accelerator, options)


def test_shards_contain_the_teacher_logits(tmp_path: Path) -> None:
    data, net = make_data(train=70), make_net(seed=1)
    cache = open_cache(tmp_path, net, data)
    with torch.no_grad():
        expected = net.eval()(make_processor()(list(data.train["image"]), return_tensors="pt")["pixel_values"]).logits
    shards = [load_file(path)["logits"] for path in sorted(cache.folder.glob("*.safetensors"))]
    assert [len(shard) for shard in shards] == [16, 16, 16, 16, 6]
    torch.testing.assert_close(torch.cat(shards), expected)
    chosen = cache(torch.zeros(3, 3, 4, 4), torch.tensor([69, 17, 0]))[0]
    torch.testing.assert_close(chosen, expected[[69, 17, 0]])


@pytest.mark.parametrize("distillation", one_of_each(["soft", "hard"], "soft"))
def test_cached_logits_train_the_same_weights(distillation: str, tmp_path: Path) -> None:
    recipe = make_recipe(**FIXED, distillation=distillation, repeated_augmentation=2, epochs=3)
    nets = [make_net() for _ in range(3)]
    caching = dataclasses.replace(recipe, teacher_cache=str(tmp_path))
    teacher = make_net(seed=1)
    seen = count_images(teacher)
    used = zip(nets, (recipe, caching, caching), strict=True)
    histories = [train(net, recipe, teacher=teacher)["history"] for net, recipe in used]
    # Two updates of 32 images in each of 3 epochs; then each of the 70 once; then none.
    assert sum(seen) == 3 * 64 + 70
    assert_equal_weights(nets[0], nets[1], atol=1e-6)
    assert_equal_weights(nets[1], nets[2], atol=0)
    assert histories[0][-1]["train_loss"] == pytest.approx(histories[1][-1]["train_loss"], rel=1e-6)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_cached_logits_keep_their_dtype(precision: str, tmp_path: Path) -> None:
    cache = open_cache(tmp_path, make_net(seed=1), make_data(train=10), precision=precision)
    stored = load_file(cache.folder / "logits-00000.safetensors")["logits"]
    assert stored.dtype == {"bf16": torch.bfloat16, "fp16": torch.float16}[precision]


def test_other_teachers_images_or_views_change_folder(tmp_path: Path) -> None:
    data, net = make_data(train=20), make_net(seed=1)
    columns = {"image": [image.rotate(180) for image in data.train["image"]], "label": data.train["label"]}
    other = dataclasses.replace(data, train=datasets.Dataset.from_dict(columns, features=data.train.features))
    caches = [
        open_cache(tmp_path, net, data),
        open_cache(tmp_path, make_net(seed=2), data),
        open_cache(tmp_path, net, other),
        open_cache(tmp_path, net, dataclasses.replace(data, fingerprint="1")),
        open_cache(tmp_path, net, data, hflip=1.0),
        open_cache(tmp_path, net, data, precision="bf16"),
    ]
    assert len({cache.folder for cache in caches}) == 6
    assert open_cache(tmp_path, net, data, seed=9, learning_rate=3.0).folder == caches[0].folder


def test_only_missing_and_damaged_shards_are_recomputed(tmp_path: Path) -> None:
    data, net = make_data(train=70), make_net(seed=1)
    folder = open_cache(tmp_path, net, data).folder
    kept = {path.name: path.read_bytes() for path in folder.iterdir()}
    (folder / "logits-00001.safetensors").write_bytes(kept["logits-00001.safetensors"][:-9])
    (folder / "logits-00004.safetensors").unlink()
    seen = count_images(net)
    open_cache(tmp_path, net, data)
    assert sum(seen) == 16 + 6
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == kept


def train_with_cache(accelerator: Accelerator, folder: Path) -> None:
    recipe = make_recipe(**FIXED, virtual_replicas=2, teacher_cache=str(folder))
    train(make_net(), recipe, accelerator, teacher=make_net(seed=1))


@pytest.mark.families
def test_two_ranks_write_the_cache_of_one(tmp_path: Path) -> None:
    call_on_ranks(functools.partial(train_with_cache, folder=tmp_path / "logits"), tmp_path / "log")
    net, data = make_net(seed=1), make_data()
    train(make_net(), make_recipe(**FIXED, teacher_cache=str(tmp_path / "alone")), teacher=net, data=data)
    shared, alone = (
        {path.relative_to(tmp_path / name): load_file(path)["logits"] for path in (tmp_path / name).rglob("*.safete*")}
        for name in ("logits", "alone")
    )
    assert shared.keys() == alone.keys() and len(shared) == 5
    torch.testing.assert_close(shared, alone)


def test_unwritable_cache_folder_raises(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match=r"logits-00000\.safetensors"):
        open_cache(tmp_path / "file", make_net(), make_data(train=10))


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"hflip": 0.5}, "got hflip 0.5; set hflip 0, or leave the cache out"),
        ({"crop_scale": (0.08, 1.0)}, r"got crop_scale \(0.08, 1.0\); set crop_scale \[1, 1\],"),
        ({"mixup": 0.8, "cutmix": 1.0}, "got mixup 0.8, cutmix 1.0; set mixup 0, cutmix 0,"),
        (
            {"auto_augment": "tv-auto", "random_erasing": 0.25},
            "got auto_augment tv-auto, random_erasing 0.25; set ",
        ),
    ],
)
def test_changing_views_raise(changes: dict[str, Any], text: str) -> None:
    with pytest.raises(RecipeError, match=f"finetune.teacher_cache .* {text}"):
        FinetuneRecipe(**{**FIXED, "teacher_cache": "logits", **changes})
    assert FinetuneRecipe(**{**FIXED, "crop_scale": [1, 1], "hflip": 1.0}, teacher_cache="logits")
