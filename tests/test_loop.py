import logging
import math
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from accelerate import Accelerator
from PIL import Image
from safetensors.torch import load_file
from torch import nn

from isoprune_hf.checkpoint.modeling_isoprune import (
    IsoImageProcessor,
    IsoPruneConfig,
    IsoPruneForImageClassification,
)
from isoprune_hf.errors import DatasetError, RecipeError
from isoprune_hf.recipes import DataRecipe, FinetuneRecipe
from isoprune_hf.training.data import ImageData, load_data
from isoprune_hf.training.loop import build_optimizer, finetune, fit_batch_size, learning_rate_at

ROOT = Path(__file__).parents[1]
ACCELERATOR = Accelerator(cpu=True)


class TinyNet(nn.Module):
    def __init__(self, width: int = 8, dropout: float = 0.0):
        super().__init__()
        self.stem = nn.Linear(48, width)
        self.norm = nn.LayerNorm(width)
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(width, 3)

    def forward(self, pixel_values: torch.Tensor) -> SimpleNamespace:
        return SimpleNamespace(logits=self.head(self.dropout(self.norm(self.stem(pixel_values.flatten(1))).tanh())))


def make_net(seed: int = 0, **changes: Any) -> TinyNet:
    torch.manual_seed(seed)
    return TinyNet(**changes)


def make_processor() -> IsoImageProcessor:
    return IsoImageProcessor(size={"height": 4, "width": 4}, do_center_crop=False)


def make_data(train: int = 70, evaluation: int = 9) -> ImageData:
    rng = np.random.default_rng(0)
    names = ("cat", "dog", "owl")
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=list(names))})

    def make_split(images: int) -> datasets.Dataset | None:
        pixels = [Image.fromarray(rng.integers(0, 256, (4, 4, 3), dtype=np.uint8)) for _ in range(images)]
        columns = {"image": pixels, "label": rng.integers(0, 3, images).tolist()}
        return datasets.Dataset.from_dict(columns, features=features) if images else None

    return ImageData(make_split(train), make_split(evaluation), names, "random", "0")


def make_recipe(**changes: Any) -> FinetuneRecipe:
    plain = {"epochs": 2, "batch_size": 32, "optimizer": "sgd", "learning_rate": 0.1}
    return FinetuneRecipe(**{**plain, "crop_scale": (0.5, 1.0), "clip_grad": 1.0, **changes})


def train(net: nn.Module, recipe: FinetuneRecipe, accelerator: Accelerator = ACCELERATOR, **options: Any) -> dict:
    data = options.pop("data", None) or make_data()
    return finetune(net, data, make_processor(), recipe, accelerator=accelerator, **options)


def assert_equal_weights(first: nn.Module, second: nn.Module, atol: float) -> None:
    torch.testing.assert_close(dict(first.state_dict()), dict(second.state_dict()), atol=atol, rtol=0)


def test_one_update_is_one_step_along_the_gradient_of_the_mean_loss():
    data, net, teacher = make_data(train=12, evaluation=0), make_net(), make_net(seed=1)
    options = {"epochs": 1, "batch_size": 12, "clip_grad": None, "crop_scale": (1.0, 1.0), "hflip": 0.0}
    recipe = make_recipe(**options, weight_decay=0.01, momentum=0.0, label_smoothing=0.0, distillation="hard")
    images = make_processor()(list(data.train["image"]), return_tensors="pt")["pixel_values"]
    reference = make_net()
    logits, labels = reference(images).logits, torch.tensor(data.train["label"])
    teacher_labels = teacher(images).logits.argmax(dim=1)
    loss = (nn.functional.cross_entropy(logits, labels) + nn.functional.cross_entropy(logits, teacher_labels)) / 2
    loss.backward()
    with torch.no_grad():
        for parameter in reference.parameters():
            decay = 0.01 * parameter if parameter.ndim >= 2 else 0.0
            parameter -= 0.1 * (parameter.grad + decay)
    result = train(net, recipe, data=data, teacher=teacher)
    assert result["history"][0]["train_loss"] == pytest.approx(loss.item(), rel=1e-6)
    assert_equal_weights(net, reference, atol=1e-6)


def test_accumulation_changes_nothing():
    once, often = make_net(), make_net()
    first = train(once, make_recipe(), teacher=make_net(seed=1))
    second = train(often, make_recipe(grad_accumulation=4), teacher=make_net(seed=1))
    assert_equal_weights(once, often, atol=1e-6)
    losses = [[entry["train_loss"] for entry in result["history"][1:]] for result in (first, second)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_the_same_seed_gives_the_same_weights_and_another_seed_others():
    nets = [make_net(dropout=0.5) for _ in range(3)]
    for net, seed, draws in zip(nets, (0, 0, 1), (0, 5, 0), strict=True):
        torch.rand(draws)
        train(net, make_recipe(seed=seed))
    assert_equal_weights(nets[0], nets[1], atol=0)
    assert not torch.equal(nets[0].head.weight, nets[2].head.weight)


def test_training_leaves_the_global_generator_alone():
    net, data = make_net(dropout=0.5), make_data()
    torch.manual_seed(7)
    expected = torch.rand(2)
    torch.manual_seed(7)
    train(net, make_recipe(epochs=1), data=data)
    assert torch.equal(torch.rand(2), expected)


def test_it_ends_in_eval_mode_without_gradients_and_freezes_the_teacher():
    net, teacher = make_net(), make_net(seed=1).train()
    before = {name: tensor.clone() for name, tensor in teacher.state_dict().items()}
    train(net, make_recipe(), teacher=teacher)
    assert not net.training and all(parameter.grad is None for parameter in net.parameters())
    assert not teacher.training and not any(parameter.requires_grad for parameter in teacher.parameters())
    assert all(torch.equal(tensor, before[name]) for name, tensor in teacher.state_dict().items())


def test_each_epoch_is_saved_and_the_best_when_top1_rises():
    saved, net = [], make_net()

    def save(name: str, model: nn.Module, entry: dict[str, Any]) -> None:
        assert model is net
        saved.append((name, entry["epoch"]))

    result = train(net, make_recipe(epochs=4), save=save)
    top1 = [entry["top1"] for entry in result["history"]]
    assert [entry["epoch"] for entry in result["history"]] == [0, 1, 2, 3, 4]
    assert set(result["history"][0]) == {"epoch", "top1", "top5", "loss", "images"}
    assert set(result["history"][1]) == {*result["history"][0], "train_loss", "lr", "images_per_second"}
    assert [epoch for name, epoch in saved if name == "last"] == [1, 2, 3, 4]
    rises = [epoch for epoch in range(1, 5) if top1[epoch] > max([-1.0, *top1[1:epoch]])]
    assert [epoch for name, epoch in saved if name == "best"] == rises
    assert result["best_epoch"] == rises[-1]


def test_without_an_evaluation_split_the_last_epoch_is_the_best():
    saved = []
    result = train(make_net(), make_recipe(), data=make_data(evaluation=0), save=lambda name, *_: saved.append(name))
    assert result["best_epoch"] == 2 and saved == ["last", "last"]
    assert [entry["epoch"] for entry in result["history"]] == [1, 2]


def test_each_epoch_is_one_log_line_with_its_numbers(caplog):
    with caplog.at_level(logging.INFO, logger="isoprune_hf.training.loop"):
        train(make_net(), make_recipe(epochs=1))
    lines = [record.getMessage() for record in caplog.records]
    assert len(lines) == 2 and "epoch 1: train_loss " in lines[1] and "images_per_second" in lines[1]


def test_bf16_trains_fp32_weights_near_those_of_fp32():
    full, half = make_net(), make_net()
    train(full, make_recipe())
    train(half, make_recipe(precision="bf16"), teacher=None)
    assert half.head.weight.dtype == torch.float32 and not torch.equal(full.head.weight, half.head.weight)
    assert_equal_weights(full, half, atol=2e-2)


def test_a_loss_that_is_not_finite_is_a_clear_error():
    net = make_net()
    nn.init.constant_(net.head.bias, math.inf)
    with pytest.raises(
        RecipeError, match=r"the loss is nan at update 0 of epoch 1; lower finetune.learning_rate \(now 0.1\)"
    ):
        train(net, make_recipe())
    assert torch.isfinite(net.stem.weight).all()


def test_a_batch_that_cannot_be_split_lists_the_nearest_legal_numbers():
    with pytest.raises(RecipeError, match=r"= 2 x 3, got 32; give 30 or 36"):
        fit_batch_size(1000, make_recipe(grad_accumulation=3), world=2)
    with pytest.raises(RecipeError, match=r"= 2 x 32, got 32; give 64$"):
        fit_batch_size(1000, make_recipe(grad_accumulation=32), world=2)


def test_a_small_split_shrinks_the_batch_and_says_so(caplog):
    assert fit_batch_size(32, make_recipe(grad_accumulation=4), world=2) == 32
    assert fit_batch_size(31, make_recipe(grad_accumulation=4), world=2) == 24
    assert "32 is more than the 31 training images, using 24" in caplog.text


def test_too_few_images_and_no_training_split_are_clear_errors():
    with pytest.raises(DatasetError, match=r"7 training images are fewer than ranks x grad_accumulation = 2 x 4"):
        fit_batch_size(7, make_recipe(grad_accumulation=4), world=2)
    with pytest.raises(DatasetError, match=r"'random' has no training split; set data.train_split"):
        train(make_net(), make_recipe(), data=make_data(train=0))


def test_only_parameters_with_two_dims_decay_and_frozen_ones_stay_out():
    net = make_net()
    net.stem.requires_grad_(False)
    optimizer = build_optimizer(net, FinetuneRecipe(weight_decay=0.3))
    decay, rest = optimizer.param_groups
    assert isinstance(optimizer, torch.optim.AdamW) and (decay["weight_decay"], rest["weight_decay"]) == (0.3, 0.0)
    assert [id(parameter) for parameter in decay["params"]] == [id(net.head.weight)]
    assert [id(parameter) for parameter in rest["params"]] == [
        id(parameter) for parameter in (net.norm.weight, net.norm.bias, net.head.bias)
    ]


def test_cosine_with_warm_up_follows_its_closed_form():
    recipe = FinetuneRecipe(epochs=5, learning_rate=1.0, min_learning_rate=0.2, warmup_epochs=1)
    rates = [learning_rate_at(update, recipe=recipe, updates_per_epoch=4) for update in range(20)]
    assert rates[:5] == pytest.approx([0.25, 0.5, 0.75, 1.0, 1.0])
    assert rates[12] == pytest.approx(0.6)  # half way between peak and end
    assert rates[8] == pytest.approx(0.2 + 0.8 * (1 + math.sqrt(0.5)) / 2)
    assert rates[4:] == sorted(rates[4:], reverse=True) and 0.2 < rates[-1] < 0.21


def test_step_falls_every_few_epochs():
    recipe = FinetuneRecipe(epochs=9, learning_rate=1.0, schedule="step", step_epochs=2, step_gamma=0.1)
    rates = [learning_rate_at(update, recipe=recipe, updates_per_epoch=3) for update in (0, 5, 6, 11, 12)]
    assert rates == pytest.approx([1.0, 1.0, 0.1, 0.1, 0.01])


def test_a_small_vit_learns_real_digits():
    base = {"library": "timm", "architecture": "vit_tiny_patch16_224"}
    base["args"] = {"img_size": 16, "patch_size": 4, "embed_dim": 32, "depth": 2, "num_heads": 2}
    torch.manual_seed(0)
    model = IsoPruneForImageClassification(IsoPruneConfig(base=base, num_labels=10))
    processor = IsoImageProcessor(
        size={"height": 16, "width": 16}, do_center_crop=False, image_mean=[0.5] * 3, image_std=[0.5] * 3
    )
    options = {"learning_rate": 3e-3, "batch_size": 16, "crop_scale": (1.0, 1.0), "hflip": 0.0}
    recipe = FinetuneRecipe(epochs=2, warmup_epochs=0.5, **options)
    result = finetune(model, load_data(DataRecipe(dataset="digits")), processor, recipe, accelerator=ACCELERATOR)
    start, _, end = result["history"]
    assert end["top1"] > 0.2 > start["top1"] and end["loss"] < start["loss"] - 0.2


SCRIPT = """
import sys
import torch
from accelerate import Accelerator
from safetensors.torch import save_file
from test_loop import RecipeError, make_net, make_recipe, train

accelerator = Accelerator(cpu=True)
assert accelerator.num_processes == 2
rank = accelerator.process_index
for name, recipe in (("plain", make_recipe()), ("accumulated", make_recipe(grad_accumulation=4))):
    net = make_net()
    train(net, recipe, accelerator, teacher=make_net(seed=1))
    save_file(net.state_dict(), f"{sys.argv[1]}/{name}{rank}.safetensors")

net = make_net()
if rank == 1:  # the loss of one rank alone is not finite: both must stop
    net.register_forward_pre_hook(lambda module, args, kwargs: ((), {"pixel_values": kwargs["pixel_values"] / 0}),
                                  with_kwargs=True)
try:
    train(net, make_recipe(), accelerator)
except RecipeError as error:
    open(f"{sys.argv[1]}/stopped{rank}", "w").write(str(error))

normed = make_net()
normed.norm = torch.nn.BatchNorm1d(8)
train(normed, make_recipe(), accelerator)
save_file(normed.state_dict(), f"{sys.argv[1]}/normed{rank}.safetensors")
accelerator.end_training()
"""


@pytest.mark.slow
def test_two_ranks_train_the_weights_of_one(tmp_path):
    (tmp_path / "script.py").write_text(SCRIPT)
    paths = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    environment = os.environ | {"ACCELERATE_USE_CPU": "true", "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command = [*launch, str(tmp_path / "script.py"), str(tmp_path)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    alone = make_net()
    train(alone, make_recipe(), teacher=make_net(seed=1))
    for name in ("plain0", "plain1", "accumulated0", "accumulated1"):
        weights = load_file(tmp_path / f"{name}.safetensors")
        torch.testing.assert_close(weights, dict(alone.state_dict()), atol=1e-5, rtol=0)
    assert all("the loss is nan" in (tmp_path / f"stopped{rank}").read_text() for rank in range(2))
    # Running statistics too: what a rank evaluates is what the main process saves.
    first, second = (load_file(tmp_path / f"normed{rank}.safetensors") for rank in range(2))
    torch.testing.assert_close(first, second, atol=0, rtol=0)
