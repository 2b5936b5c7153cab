"""The estimate of a run, compared with values computed by hand."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from plan_run import Run, count_kept_bytes, count_parts, count_seconds, count_state_bytes, open_run, plan
from torch import nn

from isoprune_hf.recipes import FinetuneRecipe

pytestmark = pytest.mark.benchmarks

RECIPES = Path(__file__).parents[2] / "recipes"


def make_run(**changes: object) -> Run:
    recipe = FinetuneRecipe(**{"epochs": 10, "batch_size": 1024, "precision": "fp16", "ema_decay": 0.99, **changes})
    return Run(recipe, train_flops=6e9, eval_flops=2e9, params=10**6, teacher_params=2 * 10**6, kept_bytes=2**20)


def test_time_is_operations_divided_by_throughput() -> None:
    # 10 epochs of 1,281,167 images at 6 GFLOP, and 10 evaluations, twice, of 50,000 images at 2 GFLOP.
    expected = (10 * 1_281_167 * 6e9 + 20 * 50_000 * 2e9) / (8 * 100e12 * 0.25)
    assert count_seconds(make_run(), 8, peak=100, mfu=0.25) == pytest.approx(expected)
    every = make_run(evaluate_every=4, ema_decay=None)  # after epochs 4, 8 and 10
    expected = (10 * 1_281_167 * 6e9 + 3 * 50_000 * 2e9) / (100e12 * 0.5)
    assert count_seconds(every, 1, peak=100, mfu=0.5) == pytest.approx(expected)


def test_state_bytes_are_counted_per_parameter() -> None:
    # Weights 4, gradients 4, moments 8, 16 bits 2, average 4, buckets 4; the teacher 4 + 2.
    assert count_state_bytes(make_run(), 8) == 26 * 10**6 + 6 * 2 * 10**6
    bare = make_run(optimizer="sgd", precision="no", ema_decay=None, teacher_precision="bf16")
    assert count_state_bytes(bare, 1) == 12 * 10**6 + 2 * 2 * 10**6
    fixed = {"crop_scale": (1.0, 1.0), "hflip": 0.0, "teacher_cache": "logits"}
    assert count_state_bytes(make_run(**fixed), 8) == 26 * 10**6


def test_recipe_parts_are_used_if_gpus_divide_them() -> None:
    assert [count_parts(FinetuneRecipe(virtual_replicas=16), gpus) for gpus in (1, 8, 16, 64)] == [16, 16, 16, 64]
    assert count_parts(FinetuneRecipe(grad_accumulation=4), 8) == 32


def test_row_shows_estimated_figures() -> None:
    cells = plan(make_run(virtual_replicas=8), 64, peak=100, mfu=0.3, price=2, loader=400)
    hours = (10 * 1_281_167 * 6e9 + 20 * 50_000 * 2e9) / (64 * 100e12 * 0.3) / 3600
    assert cells[:4] == ["64", "64*", "16", "6.0"]
    assert cells[4:7] == [f"{hours:.1f}", f"{64 * hours:.0f}", f"{128 * hours:.0f}"]
    assert cells[7:9] == ["320000", "12.5"]  # 5,000 images a second on each GPU
    assert cells[9:] == [f"{38e6 / 2**30:.2f}", "0.0"]


class Small(nn.Module):
    """Two linear layers, 12 to 5 and 5 to 2, with a ReLU in between."""

    def __init__(self) -> None:
        super().__init__()
        self.config = SimpleNamespace(image_size=[3, 2, 2])
        self.first, self.last = nn.Linear(12, 5), nn.Linear(5, 2)

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        return self.last(self.first(pixel_values.flatten(1)).relu())


def test_saved_tensors_are_counted_once() -> None:
    # The input, 12 numbers, for the first weight; the output of the ReLU, 5, for itself and for the last weight.
    assert count_kept_bytes(Small(), FinetuneRecipe()) == 4 * (12 + 5)


def test_recipe_of_the_paper_can_be_estimated() -> None:
    run = open_run(str(RECIPES / "deit_0.6g.yaml"))
    # 0.63 GMACs, three times, and RegNetY-16GF: 16.0 (both as published, to what random gradients give).
    assert run.train_flops == pytest.approx(2e9 * (3 * 0.63 + 15.95), rel=0.02)
    assert run.teacher_params == pytest.approx(83.59e6, rel=1e-3) and run.params == pytest.approx(3.08e6, rel=0.02)
