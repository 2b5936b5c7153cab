import functools
import logging
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from helpers.ranks import call_on_ranks
from helpers.tiny_models import make_base
from helpers.training import (
    ACCELERATOR,
    assert_equal_weights,
    make_data,
    make_net,
    make_normed,
    make_processor,
    make_recipe,
    make_replica_recipe,
    train,
)
from safetensors.torch import load_file, save_file
from timm.layers import DropPath
from torch import nn

from isoprune_hf.checkpoint.modeling_isoprune import (
    IsoImageProcessor,
    IsoPruneConfig,
    IsoPruneForImageClassification,
)
from isoprune_hf.data.augmentation import TransformedImages, seed_from, train_transform
from isoprune_hf.data.dataset import ImageData, load_data
from isoprune_hf.data.epochs import EpochOrder, TrainBatches, train_batches
from isoprune_hf.data.loading import LoaderOptions
from isoprune_hf.errors import DatasetError, RecipeError
from isoprune_hf.evaluation.evaluate import evaluate_model
from isoprune_hf.pruning.prune import prune_model
from isoprune_hf.recipes import DataRecipe, FinetuneRecipe, PruneRecipe
from isoprune_hf.training.finetune import finetune
from isoprune_hf.training.log import describe_wait
from isoprune_hf.training.mixing import mix
from isoprune_hf.training.optimisation import build_optimizer

ROOT = Path(__file__).parents[2]


class SimpleTeacher(nn.Module):
    """Predicts class 2 for every image."""

    def forward(self, pixel_values: torch.Tensor) -> SimpleNamespace:
        return SimpleNamespace(logits=torch.tensor([[0.0, 0.0, 1.0]]).expand(len(pixel_values), 3))


def test_update_steps_along_the_mean_gradient():
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


def test_weights_depend_on_the_seed():
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


def test_training_ends_in_eval_mode_without_gradients():
    net, teacher = make_net(), make_net(seed=1).train()
    before = {name: tensor.clone() for name, tensor in teacher.state_dict().items()}
    train(net, make_recipe(), teacher=teacher)
    assert not net.training and all(parameter.grad is None for parameter in net.parameters())
    assert all(torch.equal(tensor, before[name]) for name, tensor in teacher.state_dict().items())


def test_teacher_is_frozen_only_while_it_teaches(monkeypatch: pytest.MonkeyPatch) -> None:
    teacher = make_net(seed=1).train()
    teacher.head.bias.requires_grad_(False)
    teacher.dropout.eval()
    during: list[bool] = []
    forward = type(teacher).forward

    def record(self, pixel_values: torch.Tensor) -> SimpleNamespace:
        if self is teacher:
            during.append(self.training or any(parameter.requires_grad for parameter in self.parameters()))
        return forward(self, pixel_values)

    monkeypatch.setattr(type(teacher), "forward", record)
    train(make_net(), make_recipe(epochs=1), teacher=teacher)
    assert during and not any(during)
    assert [name for name, module in teacher.named_modules() if not module.training] == ["dropout"]
    assert [name for name, parameter in teacher.named_parameters() if not parameter.requires_grad] == ["head.bias"]


def test_each_epoch_and_each_best_are_saved():
    saved, net = [], make_net()

    def save(name: str, model: nn.Module, entry: dict[str, Any]) -> None:
        assert model is net
        saved.append((name, entry["epoch"]))

    result = train(net, make_recipe(epochs=4), save=save)
    top1 = [entry["top1"] for entry in result["history"]]
    assert [entry["epoch"] for entry in result["history"]] == [0, 1, 2, 3, 4]
    assert set(result["history"][0]) == {"epoch", "top1", "top5", "loss", "ece", "images"}
    assert set(result["history"][1]) == {*result["history"][0], "train_loss", "lr", "images_per_second"}
    assert [epoch for name, epoch in saved if name == "last"] == [1, 2, 3, 4]
    rises = [epoch for epoch in range(1, 5) if top1[epoch] > max([-1.0, *top1[1:epoch]])]
    assert [epoch for name, epoch in saved if name == "best"] == rises
    assert result["best_epoch"] == rises[-1]


def test_last_epoch_is_best_without_evaluation_split():
    saved = []
    result = train(make_net(), make_recipe(), data=make_data(evaluation=0), save=lambda name, *_: saved.append(name))
    assert result["best_epoch"] == 2 and saved == ["last", "last"]
    assert [entry["epoch"] for entry in result["history"]] == [1, 2]


def test_each_epoch_is_one_log_line(caplog):
    with caplog.at_level(logging.INFO, logger="isoprune_hf.training.trainer"):
        train(make_net(), make_recipe(epochs=1))
    lines = [text for record in caplog.records if "bottleneck" not in (text := record.getMessage())]
    assert len(lines) == 2 and "epoch 1: train_loss " in lines[1] and " images/s" in lines[1]


def test_bf16_trains_fp32_weights_near_those_of_fp32():
    full, half = make_net(), make_net()
    train(full, make_recipe())
    train(half, make_recipe(precision="bf16"), teacher=None)
    assert half.head.weight.dtype == torch.float32 and not torch.equal(full.head.weight, half.head.weight)
    assert_equal_weights(full, half, atol=2e-2)


@pytest.mark.parametrize(("seconds", "said"), [(1, 25), (0.3, None)])
def test_slow_loader_is_reported_once(seconds, said, caplog, monkeypatch):
    """The clock advances by `seconds` per image and 24 per batch of 8: 8 of 32 seconds are waiting, or 2.4 of 26.4."""
    clock, load, net = [0.0], TransformedImages.__getitem__, make_net()

    def read(images: TransformedImages, at: Any) -> Any:
        clock[0] += seconds
        return load(images, at)

    monkeypatch.setattr(TransformedImages, "__getitem__", read)
    for module in ("trainer", "student"):
        mocked = SimpleNamespace(perf_counter=lambda: clock[0])
        monkeypatch.setattr(f"isoprune_hf.training.{module}.time", mocked)
    net.register_forward_hook(lambda *_: clock.__setitem__(0, clock[0] + 24))
    with caplog.at_level(logging.INFO, logger="isoprune_hf.training.trainer"):
        train(net, make_recipe(epochs=2, batch_size=8), data=make_data(evaluation=0))
    lines = [record.getMessage() for record in caplog.records if "bottleneck" in record.getMessage()]
    text = f"{said}% of the time is waiting for data; raise data.num_workers (now 0)"
    assert (len(lines) == 1 and text in lines[0]) if said else not lines


def test_faster_decoder_is_named_unless_it_is_set():
    slow = describe_wait(2, 0.3, workers=0, decoder="pil")
    assert slow.endswith("raise data.num_workers (now 0), or set data.decoder: torchvision")
    assert describe_wait(2, 0.3, workers=0, decoder="torchvision").endswith("raise data.num_workers (now 0)")


def test_nonfinite_loss_raises():
    net = make_net()
    nn.init.constant_(net.head.bias, math.inf)
    with pytest.raises(RecipeError, match=r"nan at update 0 of epoch 1; .*finetune\.learning_rate \(now 0\.1\)"):
        train(net, make_recipe())
    assert torch.isfinite(net.stem.weight).all()


def first_epoch(data: ImageData, recipe: FinetuneRecipe, *, parts: int) -> TrainBatches:
    order = EpochOrder(recipe.seed, epoch=1, parts=parts, drop_last=recipe.drop_last)
    transform = train_transform(make_processor(), recipe)
    return train_batches(data.train, transform, order, LoaderOptions(recipe.batch_size))


def test_parts_have_own_statistics_that_are_averaged():
    """Compare four parts with mixup, dropout and BatchNorm with the same sums computed by hand."""
    data, net, reference = make_data(train=16, evaluation=0), make_normed(), make_normed()
    options = {"epochs": 1, "batch_size": 16, "clip_grad": None, "momentum": 0.0, "weight_decay": 0.0}
    recipe = make_recipe(**options, virtual_replicas=4, mixup=0.5, mixup_pairing="roll", distillation="none")
    train(net, recipe, data=data)
    batches = first_epoch(data, recipe, parts=4)
    reference.train()
    start = [reference.norm.running_mean.clone(), reference.norm.running_var.clone()]
    means = []
    with torch.random.fork_rng():
        for part, (_, images, labels, _) in enumerate(batches.loader):
            reference.norm.running_mean.copy_(start[0])
            reference.norm.running_var.copy_(start[1])
            torch.manual_seed(seed_from(0, 1, 0, part, 1))
            images, targets = mix(images, labels, recipe, num_classes=3, seeds=(0, 1, 0, part, 2))
            logits = reference(images).logits
            loss = nn.functional.cross_entropy(logits, targets, label_smoothing=0.1, reduction="sum") / 16
            loss.backward()
            means.append([reference.norm.running_mean.clone(), reference.norm.running_var.clone()])
    for parameter, trained in zip(reference.parameters(), net.parameters(), strict=True):
        torch.testing.assert_close(trained, parameter - 0.1 * parameter.grad, atol=1e-6, rtol=0)
    for trained, made in zip((net.norm.running_mean, net.norm.running_var), zip(*means, strict=True), strict=True):
        torch.testing.assert_close(trained, torch.stack(made).mean(0), atol=1e-6, rtol=0)
    assert net.norm.num_batches_tracked == 1


def test_short_last_batch_uses_its_own_mean():
    short = make_net()
    options = {"epochs": 1, "distillation": "none", "crop_scale": (1.0, 1.0), "hflip": 0.0, "clip_grad": None}
    # Two samples for four parts: two parts hold nothing that counts.
    recipe = make_recipe(**options, batch_size=8, virtual_replicas=4, drop_last=False, schedule="step")
    data = make_data(train=10, evaluation=0)
    entry = train(short, recipe, data=data)["history"][0]
    batches = first_epoch(data, recipe, parts=1)
    reference, losses = make_net(), []
    optimizer = build_optimizer(reference, recipe)
    for (_, images, labels, _), size in zip(batches.loader, (8, 2), strict=True):
        loss = nn.functional.cross_entropy(reference(images).logits, labels, label_smoothing=0.1)
        reference.zero_grad()
        loss.backward()
        losses.append(loss.item() * size)
        optimizer.step()
    assert entry["train_loss"] == pytest.approx(sum(losses) / 10, rel=1e-6)
    assert_equal_weights(short, reference, atol=1e-6)


def test_averaged_weights_are_evaluated_saved_and_kept():
    net, steps, saved = make_net(), [], {}
    weights = net.state_dict()["stem.weight"].clone()

    def save(name: str, model: nn.Module, entry: dict) -> None:
        saved[name] = model.state_dict()["stem.weight"].clone()
        if name == "last":
            steps.append(saved[name])

    recipe = make_recipe(epochs=3, batch_size=70, ema_decay=0.5, best="ema", save_every=2)
    history = train(net, recipe, save=save)["history"]
    for step in steps:  # one update an epoch
        weights = 0.5 * weights + 0.5 * step
    torch.testing.assert_close(net.state_dict()["stem.weight"], weights, atol=1e-6, rtol=0)
    torch.testing.assert_close(saved["ema"], weights, atol=1e-6, rtol=0)
    assert set(saved) == {"last", "ema", "best", "epoch-002"}
    assert {"top1", "ece", "raw_top1", "raw_top5", "raw_loss", "raw_ece"} <= history[-1].keys()
    figures = evaluate_model(net, make_data().evaluation, make_processor())
    assert figures["loss"] == pytest.approx(history[-1]["loss"], abs=1e-12)


def test_fp16_scales_the_loss_and_trains_near_fp32():
    nets = [make_net(), make_net()]
    for net, precision in zip(nets, ("no", "fp16"), strict=True):
        train(net, make_recipe(precision=precision))
    assert nets[1].stem.weight.dtype == torch.float32
    assert_equal_weights(*nets, atol=5e-3)
    assert not torch.equal(nets[0].stem.weight, nets[1].stem.weight)


@pytest.mark.parametrize("family", ["deit", "hf-deit"])
def test_teacher_trains_only_the_distillation_token(family, tmp_path):
    model = make_base(family, tmp_path, labels=3)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    teacher = SimpleTeacher()
    recipe = make_recipe(
        epochs=1, batch_size=8, distillation="hard", distillation_head="token", learning_rate=1e-2, clip_grad=None
    )
    data = make_data(train=8, evaluation=0, side=16)
    finetune(model, data, make_processor(16), recipe, accelerator=ACCELERATOR, teacher=teacher)
    names = ("head", "head_dist") if family == "deit" else ("cls_classifier", "distillation_classifier")
    change = {name: tensor - before[name] for name, tensor in model.state_dict().items()}
    # The teacher's class is always 2, so the bias of the token's head grows there alone; the labels' is spread.
    assert (change[f"model.{names[1]}.bias"] > 0).tolist() == [False, False, True]
    assert not torch.equal(change[f"model.{names[0]}.bias"], change[f"model.{names[1]}.bias"])


def test_distillation_head_needs_a_token_and_a_teacher():
    with pytest.raises(RecipeError, match=r"finetune\.distillation_head token: TinyNet"):
        train(make_net(), make_recipe(distillation_head="token"), teacher=make_net(seed=1))
    with pytest.raises(RecipeError, match=r"finetune\.distillation_head token .*finetune\.teacher"):
        train(make_net(), make_recipe(distillation_head="token"))


def test_pruned_convnext_trains_with_regularisation_and_reopens(tmp_path):
    base = make_base("convnext", tmp_path, labels=3)
    model = prune_model(base, PruneRecipe(criterion="l1", ratio=0.5, round_to=1)).model
    recipe = make_recipe(epochs=1, batch_size=4, drop_path=0.3, dropout=0.1, ema_decay=0.9, best="ema")
    finetune(model, make_data(8, 4, side=64), make_processor(64), recipe, accelerator=ACCELERATOR)
    model.save_pretrained(tmp_path / "model")
    again = IsoPruneForImageClassification.from_pretrained(tmp_path / "model").eval()
    images = torch.randn(2, 3, 64, 64)
    assert torch.equal(again(images).logits, model(images).logits)
    assert not any(isinstance(module, DropPath) for module in model.modules())


def test_missing_training_split_raises():
    with pytest.raises(DatasetError, match=r"'random' .*data\.train_split"):
        train(make_net(), make_recipe(), data=make_data(train=0))


@pytest.mark.families
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


def train_on_ranks(accelerator: Accelerator, folder: Path) -> None:
    """Train once plainly, with accumulation, with BatchNorm and mixup, and with a NaN loss on the second rank."""
    rank = accelerator.process_index
    for name, recipe in (("plain", make_recipe()), ("accumulated", make_recipe(grad_accumulation=4))):
        net = make_net()
        train(net, recipe, accelerator, teacher=make_net(seed=1))
        save_file(net.state_dict(), folder / f"{name}{rank}.safetensors")
    net = make_net()
    if rank == 1:
        net.register_forward_pre_hook(
            lambda module, args, kwargs: ((), {"pixel_values": kwargs["pixel_values"] / 0}), with_kwargs=True
        )
    with pytest.raises(RecipeError, match="the loss is nan"):
        train(net, make_recipe(), accelerator)
    normed = make_normed()
    train(normed, make_replica_recipe(), accelerator, data=make_data(train=72))
    save_file(normed.state_dict(), folder / f"normed{rank}.safetensors")


@pytest.mark.families
def test_two_ranks_train_the_weights_of_one(tmp_path):
    call_on_ranks(functools.partial(train_on_ranks, folder=tmp_path), tmp_path / "log")
    alone = make_net()
    train(alone, make_recipe(), teacher=make_net(seed=1))
    for name in ("plain0", "plain1", "accumulated0", "accumulated1"):
        weights = load_file(tmp_path / f"{name}.safetensors")
        torch.testing.assert_close(weights, dict(alone.state_dict()), atol=1e-5, rtol=0)
    # With BatchNorm, dropout, mixup and a short last batch, too; each rank has the same statistics to the last bit.
    first, second = (load_file(tmp_path / f"normed{rank}.safetensors") for rank in range(2))
    torch.testing.assert_close(first, second, atol=0, rtol=0)
    normed = make_normed()
    train(normed, make_replica_recipe(), data=make_data(train=72))
    torch.testing.assert_close(first, dict(normed.state_dict()), atol=1e-5, rtol=1e-5)
