"""A network without labels learns the outputs of its teacher, alike on any number of ranks and after a stop."""

import contextlib
import functools
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from helpers.ranks import call_on_ranks
from helpers.training import ACCELERATOR, make_data, make_processor, make_recipe
from safetensors.torch import load_file, save_file
from torch import nn

from isoprune_hf import IsoPruneConfig
from isoprune_hf.errors import RecipeError
from isoprune_hf.evaluation.features import evaluate_features
from isoprune_hf.models.feature_loss import FEATURES
from isoprune_hf.models.held import HeldModel
from isoprune_hf.models.objective import TargetLoss
from isoprune_hf.training.finetune import finetune
from isoprune_hf.training.judging import Judging
from isoprune_hf.training.run import RunSettings, TrainingRun


class Tokens(nn.Module):
    """Returns four tokens of a picture and their mean."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(12, 6)
        self.norm = nn.BatchNorm1d(6)

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        tokens = self.norm(self.stem(images.reshape(-1, 12))).reshape(len(images), 4, 6)
        return tokens, tokens.tanh().mean(1)


def make_features(seed: int) -> HeldModel:
    torch.manual_seed(seed)
    return HeldModel(IsoPruneConfig(image_size=[3, 4, 4]), Tokens(), FEATURES).eval()


def train(student: HeldModel, accelerator: Accelerator = ACCELERATOR, **changes: Any) -> dict[str, Any]:
    teacher, run = make_features(1), changes.pop("run", None)

    def evaluate(model: nn.Module, *inputs: Any, **options: Any) -> dict[str, float | int]:
        return evaluate_features(model, teacher, *inputs, **options)

    recipe = make_recipe(**{"batch_size": 16, "virtual_replicas": 2, **changes})
    judging = Judging(evaluate, "cosine")
    data, processor = make_data(train=48), make_processor()
    return finetune(
        student, data, processor, recipe, accelerator=accelerator, teacher=teacher, judging=judging, run=run
    )


def test_distances_are_relative_to_the_teacher() -> None:
    found = [torch.tensor([[[1.0, 0.0]], [[0.0, 2.0]]]), torch.tensor([[3.0], [5.0]])]
    wanted = [torch.tensor([[[1.0, 1.0]], [[0.0, 1.0]]]), torch.tensor([[4.0], [5.0]])]
    assert FEATURES.distances(found, wanted).tolist() == [1 / 2 + 1 / 16, 1.0]
    assert TargetLoss("squared_error", 1).distances(found, wanted).tolist() == [1.0, 0.0]


def test_training_loss_is_the_mean_distance() -> None:
    student, teacher, data = make_features(0), make_features(1), make_data(train=16)
    recipe = make_recipe(batch_size=16, crop_scale=(1.0, 1.0), hflip=0.0, epochs=1)
    pixels = make_processor()([*data.train["image"]], return_tensors="pt").pixel_values
    with torch.no_grad():
        found = make_features(0).train()(pixel_values=pixels).outputs
        wanted = make_features(1)(pixel_values=pixels).outputs
    expected = sum(
        ((a - b).flatten(1).norm(dim=1) / b.flatten(1).norm(dim=1)) ** 2 for a, b in zip(found, wanted, strict=True)
    )
    result = finetune(student, data, make_processor(), recipe, accelerator=ACCELERATOR, teacher=teacher)
    assert result["history"][-1]["train_loss"] == pytest.approx(float(expected.mean()), rel=1e-5)
    torch.testing.assert_close(teacher.state_dict(), make_features(1).state_dict(), atol=0, rtol=0)


def test_best_epoch_is_nearest_to_the_base() -> None:
    result = train(make_features(0), epochs=3)
    cosines = [entry["cosine"] for entry in result["history"]]
    assert cosines[-1] > cosines[0] and result["best_epoch"] == max(range(1, 4), key=cosines.__getitem__)
    assert "top1" not in result["history"][-1]


def test_stopped_training_resumes_exactly(tmp_path: Path) -> None:
    def run(folder: str, seed: int, stop_after: int | None = None) -> HeldModel:
        opened = TrainingRun(tmp_path / folder, {}, ACCELERATOR, RunSettings(snapshot_every=1))
        written: list[str] = []

        def write(snapshot: Any, **options: Any) -> None:
            TrainingRun.save_snapshot(opened, snapshot, **options)
            written.append(snapshot.name)
            if len(written) == stop_after:
                raise KeyboardInterrupt

        opened.save_snapshot = write
        student = make_features(seed)
        with opened, contextlib.suppress(KeyboardInterrupt):
            train(student, run=opened, state_every=1)
        return student

    whole = run("whole", 0).state_dict()
    run("stopped", 0, stop_after=4)
    resumed = run("stopped", 5).state_dict()  # its own weights do not matter
    assert all(torch.equal(tensor, whole[name]) for name, tensor in resumed.items())


def train_on_ranks(accelerator: Accelerator, folder: Path) -> None:
    student = make_features(0)
    history = train(student, accelerator)["history"]
    cosine = torch.tensor([entry["cosine"] for entry in history])
    save_file({**student.state_dict(), "cosine": cosine}, folder / f"{accelerator.process_index}.safetensors")


def test_two_ranks_learn_what_one_does(tmp_path: Path) -> None:
    call_on_ranks(functools.partial(train_on_ranks, folder=tmp_path), tmp_path / "log")
    first, second = (load_file(tmp_path / f"{rank}.safetensors") for rank in range(2))
    torch.testing.assert_close(first, second, atol=0, rtol=0)
    alone = make_features(0)
    history = train(alone)["history"]
    expected = {**alone.state_dict(), "cosine": torch.tensor([entry["cosine"] for entry in history])}
    torch.testing.assert_close(first, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"distillation": "hard"}, "finetune.distillation hard is for classes"),
        ({"teacher": "none"}, "learns from a teacher alone"),
        ({"distillation_head": "token"}, "finetune.distillation_head token is for classes"),
    ],
)
def test_settings_of_classes_are_refused(changes: dict[str, Any], text: str) -> None:
    with pytest.raises(RecipeError, match=text):
        train(make_features(0), **changes)
