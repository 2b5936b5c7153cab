"""Training on lists of classes: binary cross-entropy, mixed targets, a teacher, and any number of ranks."""

import contextlib
import functools
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from datasets import Image
from helpers.ranks import call_on_ranks
from helpers.shapes import SHAPES, shape_rows
from helpers.training import ACCELERATOR, assert_equal_weights, make_net, make_recipe, train
from timm.data.mixup import Mixup
from timm.loss import BinaryCrossEntropy
from torch.distributions import Bernoulli, Categorical, kl_divergence

from isoprune_hf.checkpoint.snapshots import Snapshot
from isoprune_hf.data.augmentation import seeded_generators
from isoprune_hf.data.dataset import ImageData
from isoprune_hf.errors import RecipeError
from isoprune_hf.models.divergence import class_divergence, label_divergence
from isoprune_hf.training.distillation import label_loss
from isoprune_hf.training.mixing import mix
from isoprune_hf.training.run import RunSettings, TrainingRun

PLAIN = {"label_smoothing": 0.0, "weight": 0.5, "temperature": 1.0}
TARGETS = torch.tensor([[1.0, 0.0, 1.0], [0.0, 0.0, 0.0]])


def random_logits(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * 3


def test_loss_by_hand() -> None:
    logits = torch.tensor([[0.0, 1.0, -2.0]])
    log_loss = [0.6931472, 1.3132617, 2.1269280]  # -log s(0), -log(1 - s(1)), -log s(-2)
    found = label_loss(logits, TARGETS[:1], None, **PLAIN)
    assert found.tolist() == pytest.approx([sum(log_loss) / 3])


def test_smoothing_is_that_of_timm() -> None:
    logits = random_logits(2, 3)
    wanted = BinaryCrossEntropy(smoothing=0.2, smooth_dense=True)(logits, TARGETS)
    assert label_loss(logits, TARGETS, None, **PLAIN | {"label_smoothing": 0.2}).mean() == pytest.approx(float(wanted))


def test_teacher_is_a_divergence_of_each_class() -> None:
    logits, taught, teacher = (random_logits(2, 3, seed=seed) for seed in range(3))
    plain = label_loss(logits, TARGETS, None, **PLAIN)
    found = label_loss(
        logits, TARGETS, teacher, label_smoothing=0.0, weight=0.25, temperature=2.0, taught_logits=taught
    )
    divergence = kl_divergence(Bernoulli(logits=teacher / 2), Bernoulli(logits=taught / 2)).mean(1)
    torch.testing.assert_close(found, 0.75 * plain + 0.25 * 4 * divergence)


def test_divergences_are_those_of_torch() -> None:
    wanted, found = random_logits(4, 5).double(), random_logits(4, 5, seed=1).double()
    of_labels = kl_divergence(Bernoulli(logits=wanted), Bernoulli(logits=found)).sum(-1)
    torch.testing.assert_close(label_divergence(wanted, found), of_labels)
    of_classes = kl_divergence(Categorical(logits=wanted), Categorical(logits=found))
    torch.testing.assert_close(class_divergence(wanted, found), of_classes)
    assert label_divergence(wanted * 1e3, found * 1e3).isfinite().all()


@pytest.mark.parametrize("pairing", ["flip", "roll"])
def test_mixed_targets_follow_the_images(pairing: str) -> None:
    pixels = TARGETS.repeat(2, 1)[:, :, None, None].expand(4, 3, 4, 4).clone()  # an image shows its targets
    recipe = make_recipe(mixup=1.0, mixup_pairing=pairing)
    mixed, targets = mix(pixels.clone(), TARGETS.repeat(2, 1), recipe, num_classes=3, seeds=(0,))
    torch.testing.assert_close(mixed[:, :, 0, 0], targets)
    assert not torch.equal(targets, TARGETS.repeat(2, 1))
    if pairing == "flip":
        with seeded_generators(0):
            timm = Mixup(1.0, label_smoothing=0.0, num_classes=3, multi_label=True)
            torch.testing.assert_close(targets, timm(pixels.clone(), TARGETS.repeat(2, 1))[1])


def make_shapes(images: int = 70) -> ImageData:
    return ImageData(shape_rows(images), shape_rows(9, seed=1), SHAPES, "shapes", "0")


def train_to(file: Path, accelerator: Accelerator) -> None:
    net = make_net()
    train(net, make_recipe(virtual_replicas=2, mixup=0.5), accelerator, data=make_shapes(), teacher=make_net(1))
    if accelerator.is_main_process:
        torch.save(net.state_dict(), file)


def test_training_learns_the_labels() -> None:
    net = make_net()
    found = train(net, make_recipe(epochs=4, learning_rate=0.5, crop_scale=(1.0, 1.0)), data=make_shapes())
    figures = found["history"]
    assert figures[-1]["loss"] < figures[0]["loss"] and figures[-1]["map"] > figures[0]["map"]
    best = max(figures[1:], key=lambda entry: entry["map"])
    assert found["best_epoch"] == best["epoch"] and "top1" not in best


def test_stream_of_lists_is_trained_on() -> None:
    stored = shape_rows(40).cast_column("image", Image(decode=False))
    data = replace(make_shapes(), train=stored.to_iterable_dataset(), buffer=8)
    recipe = make_recipe(epochs=2, batch_size=8, steps_per_epoch=3, mixup=0.5)
    figures = train(make_net(), recipe, data=data)["history"]
    assert [entry["epoch"] for entry in figures] == [0, 1, 2] and figures[-1]["loss"] < figures[0]["loss"]


def test_two_ranks_train_as_one(tmp_path: Path) -> None:
    call_on_ranks(functools.partial(train_to, tmp_path / "net"), tmp_path)
    alone, together = make_net(), make_net(5)
    train(alone, make_recipe(virtual_replicas=2, mixup=0.5), data=make_shapes(), teacher=make_net(1))
    together.load_state_dict(torch.load(tmp_path / "net", weights_only=True))
    assert_equal_weights(alone, together, atol=1e-6)


def test_resumed_training_ends_with_equal_weights(tmp_path: Path) -> None:
    recipe = make_recipe(batch_size=8, mixup=0.5, epochs=1)

    def run(folder: str, net: torch.nn.Module, stop_after: int | None = None) -> torch.nn.Module:
        opened = TrainingRun(tmp_path / folder, {}, ACCELERATOR, RunSettings(snapshot_every=1))
        saved = []

        def save(snapshot: Snapshot, **options: Any) -> None:
            TrainingRun.save_snapshot(opened, snapshot, **options)
            saved.append(snapshot.name)
            if len(saved) == stop_after:
                raise KeyboardInterrupt

        opened.save_snapshot = save
        with opened, contextlib.suppress(KeyboardInterrupt):
            train(net, recipe, data=make_shapes(24), teacher=make_net(1), run=opened)
        return net

    whole = run("whole", make_net())
    run("stopped", make_net(), stop_after=2)
    assert_equal_weights(run("stopped", make_net(5)), whole, atol=0.0)


def test_average_is_evaluated_by_the_same_figures() -> None:
    history = train(make_net(), make_recipe(epochs=1, ema_decay=0.5), data=make_shapes())["history"]
    assert {"map", "loss", "ema_map", "ema_loss"} <= history[-1].keys()


def test_hard_teacher_of_lists_is_refused() -> None:
    recipe = make_recipe(distillation="hard")
    with pytest.raises(RecipeError, match=r"finetune\.distillation hard takes the top class"):
        train(make_net(), recipe, data=make_shapes(), teacher=make_net(1))
    assert train(make_net(), replace(recipe, epochs=1), data=make_shapes())["history"]
