"""A training that is restored from a snapshot continues exactly like the original."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from helpers.marks import one_of_each
from helpers.training import make_data, make_normed, make_processor, make_recipe

from isoprune_hf.checkpoint.snapshots import read_newest_snapshot, write_snapshot
from isoprune_hf.data.augmentation import train_transform
from isoprune_hf.data.epochs import EpochOrder, train_batches
from isoprune_hf.data.loading import LoaderOptions
from isoprune_hf.models import load_base
from isoprune_hf.recipes import FinetuneRecipe
from isoprune_hf.recipes.finetune import list_optimizers
from isoprune_hf.training.finetune import finetune
from isoprune_hf.training.optimisation import build_optimizer
from isoprune_hf.training.progress import Progress
from isoprune_hf.training.run import RunSettings, TrainingRun
from isoprune_hf.training.state import capture, restore

ACCELERATOR = Accelerator(cpu=True)
KINDS: dict[str, dict[str, Any]] = {
    "sgd with BatchNorm and mixup": {"mixup": 0.5, "virtual_replicas": 2},
    "adamw with an average": {"optimizer": "adamw", "learning_rate": 1e-2, "ema_decay": 0.5, "best": "ema"},
    "fp16": {"precision": "fp16"},
    "lamb, which counts its steps in its groups as tensors": {"optimizer": "lamb", "learning_rate": 1e-2},
    "adan, which counts them there as numbers": {"optimizer": "adan", "learning_rate": 1e-2},
    "lion": {"optimizer": "lion", "learning_rate": 1e-3},
    "madgrad, which has numbers for each parameter": {"optimizer": "madgrad", "learning_rate": 1e-2},
    "muon, which has truths": {"optimizer": "muon", "learning_rate": 1e-2},
    "bf16 with copies": {"precision": "bf16", "repeated_augmentation": 2},
}


@pytest.mark.parametrize("kind", one_of_each(KINDS, *[*KINDS][:3]))
def test_resuming_after_any_update_is_exact(kind: str, tmp_path) -> None:
    data, recipe = make_data(train=24), make_recipe(batch_size=8, state_every=1, **KINDS[kind])

    def train(net: torch.nn.Module, folder: str, stop_after: int | None = None) -> list[dict[str, Any]]:
        run = TrainingRun(tmp_path / folder, {"kind": kind}, ACCELERATOR, RunSettings(snapshot_every=1))
        written = []

        def write(snapshot, **options: Any) -> None:
            TrainingRun.save_snapshot(run, snapshot, **options)
            written.append(snapshot.name)
            if len(written) == stop_after:
                raise KeyboardInterrupt

        run.save_snapshot = write
        with run:
            try:
                return finetune(net, data, make_processor(), recipe, accelerator=ACCELERATOR, run=run)["history"]
            except KeyboardInterrupt:
                return []

    whole = make_normed()
    expected = train(whole, "whole")
    for stop_after in (1, 2, 3, 5):  # within an epoch, and at its end
        train(make_normed(), f"stopped{stop_after}", stop_after)
        net = make_normed(seed=5)  # its weights do not matter
        history = train(net, f"stopped{stop_after}")
        assert all(torch.equal(tensor, whole.state_dict()[name]) for name, tensor in net.state_dict().items())
        for entry, other in zip(history, expected, strict=True):
            speed = {"images_per_second"}
            assert {k: v for k, v in entry.items() if k not in speed} == {
                k: v for k, v in other.items() if k not in speed
            }


@pytest.mark.parametrize("name", list_optimizers())
def test_every_optimizer_resumes_from_its_snapshot(name: str, tmp_path: Path) -> None:
    recipe = FinetuneRecipe(optimizer=name, learning_rate=1e-2)

    def begin(seed: int) -> SimpleNamespace:
        net = make_normed(seed=seed)
        scaler = torch.amp.GradScaler("cpu", enabled=False)
        return SimpleNamespace(model=net, ema=None, optimizer=build_optimizer(net, recipe), scaler=scaler)

    def step(training: SimpleNamespace, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        for parameter in training.model.parameters():
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        training.optimizer.step()

    whole, other = begin(0), begin(5)
    for seed in range(3):
        step(whole, seed)
    write_snapshot(tmp_path, capture(whole, Progress(epoch=2, update=3)), run="run")
    step(other, 9)  # what it has must go
    progress = restore(other, read_newest_snapshot(tmp_path, run="run"))
    assert (progress.epoch, progress.update) == (2, 3)
    before = [parameter.detach().clone() for parameter in whole.model.parameters()]
    for seed in (3, 4):
        step(whole, seed)
        step(other, seed)
    pairs = list(zip(whole.model.parameters(), other.model.parameters(), strict=True))
    assert all(torch.equal(parameter, again) for parameter, again in pairs)
    assert not any(torch.equal(parameter, old) for (parameter, _), old in zip(pairs, before, strict=True))


@pytest.mark.parametrize("start", [0, 1, 3])
def test_updates_before_the_start_are_not_read(start: int) -> None:
    data, recipe, read = make_data(train=30), make_recipe(batch_size=8), []

    class Watched:
        def __len__(self) -> int:
            return 30

        def __getitem__(self, position: int) -> dict[str, Any]:
            read.append(position)
            return data.train[position]

    transform = train_transform(make_processor(), recipe)
    order, options = EpochOrder(seed=0, epoch=1, parts=2), LoaderOptions(batch_size=8)
    whole = [batch.positions.tolist() for batch in train_batches(data.train, transform, order, options).loader]
    rest = train_batches(Watched(), transform, order, options, start=start)
    assert [batch.positions.tolist() for batch in rest.loader] == whole[2 * start :]
    assert read == [position for part in whole[2 * start :] for position in part]
    assert rest.totals == [8, 8, 8] and len(rest.sizes) == 6


def test_restored_state_keeps_its_module_versions(tmp_path: Path) -> None:
    first, second = (load_base("torchvision/mnasnet0_5", False, num_labels=3, seed=seed).model for seed in (0, 1))
    trainings = [
        SimpleNamespace(
            model=model,
            ema=None,
            optimizer=torch.optim.SGD(model.parameters(), lr=1.0),
            scaler=torch.amp.GradScaler("cpu", enabled=False),
        )
        for model in (first, second)
    ]
    progress = restore(trainings[1], capture(trainings[0], Progress(epoch=2, update=3)))
    assert (progress.epoch, progress.update) == (2, 3)
    for name, tensor in second.state_dict().items():
        assert torch.equal(tensor, first.state_dict()[name]), name
