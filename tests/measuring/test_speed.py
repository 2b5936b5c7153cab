"""Latency: who is timed, how often, and in which state the models are left."""

import time
from pathlib import Path

import pytest
import torch
from helpers.tiny_models import make_base
from torch import nn

from isoprune_hf.errors import RecipeError
from isoprune_hf.measuring import speed
from isoprune_hf.measuring.speed import measure_latency, measure_pair, record_measurement


class Recorder(nn.Module):
    """Notes each call in a shared list."""

    def __init__(self, name: str, calls: list[tuple]) -> None:
        super().__init__()
        self.name, self.calls = name, calls
        self.weight = nn.Parameter(torch.zeros(1, dtype=torch.float64))
        self.drop = nn.Dropout()

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        self.calls.append(
            (self.name, tuple(pixels.shape), pixels.dtype, self.training, torch.is_inference_mode_enabled())
        )
        return pixels


def test_models_take_turns_in_eval_mode_on_the_batch_asked_for() -> None:
    calls: list[tuple] = []
    models = {name: Recorder(name, calls) for name in ("base", "pruned")}
    measure_latency(models, (3, 4, 5), batch_size=2, repeats=2, warmup=1)
    assert [call[0] for call in calls] == ["base", "pruned"] * 3
    assert {call[1:] for call in calls} == {((2, 3, 4, 5), torch.float64, False, True)}


def test_the_median_of_the_timed_passes_is_given_in_milliseconds(monkeypatch: pytest.MonkeyPatch) -> None:
    # Start and end of each pass in seconds: one warm-up of 9 s, then 0.002, 0.5 and 0.004 s; the median is 4 ms.
    clock = iter([0, 9, 10, 10.002, 20, 20.5, 30, 30.004])
    monkeypatch.setattr(time, "perf_counter", lambda: next(clock))
    latency = measure_latency({"base": Recorder("base", [])}, (3, 2, 2), repeats=3, warmup=1)
    assert latency == {"base": pytest.approx(4.0)}


def test_train_and_eval_mode_of_every_module_are_restored_also_after_an_error() -> None:
    model = Recorder("base", []).train()
    model.drop.eval()
    measure_latency({"base": model}, (3, 2, 2), repeats=1, warmup=0)
    assert (model.training, model.drop.training) == (True, False)
    broken = nn.Sequential(nn.Linear(3, 3), nn.Dropout().eval())
    with pytest.raises(RuntimeError):
        measure_latency({"broken": broken}, (3, 2, 2), repeats=1)
    assert (broken.training, broken[0].training, broken[1].training) == (True, True, False)


def test_the_device_is_waited_for_before_and_after_a_pass_on_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    devices = []
    monkeypatch.setattr(torch.cuda, "synchronize", devices.append)
    speed._synchronize(torch.device("cpu"))
    speed._synchronize(torch.device("cuda", 1))
    assert devices == [torch.device("cuda", 1)]


def test_bf16_times_a_copy_and_leaves_the_model_in_its_own_precision() -> None:
    calls: list[tuple] = []
    model = Recorder("base", calls)
    model.__deepcopy__ = lambda memo: Recorder("copy", calls)
    measure_latency({"base": model}, (3, 2, 2), precision="bf16", repeats=1, warmup=0)
    assert [(call[0], call[2]) for call in calls] == [("copy", torch.bfloat16)]
    assert model.weight.dtype == torch.float64


def test_base_and_pruned_are_measured_in_turns_on_the_image_of_the_base(tmp_path: Path) -> None:
    base, order = make_base("vit", tmp_path), []
    pruned = make_base("vit", tmp_path)
    base.register_forward_hook(lambda module, inputs, output: order.append(("base", tuple(inputs[0].shape))))
    pruned.register_forward_hook(lambda module, inputs, output: order.append(("pruned", tuple(inputs[0].shape))))
    times = measure_pair(base, pruned, batch_size=3, repeats=2)
    assert len(times) == 2 and min(times) > 0
    assert order == [("base", (3, 3, 16, 16)), ("pruned", (3, 3, 16, 16))] * 5


def test_a_record_says_what_was_measured() -> None:
    settings = {"batch_size": 4, "precision": "bf16", "backend": "compile", "repeats": 7}
    record = record_measurement(torch.device("cpu"), **settings)
    expected = {**settings, "device": "cpu", "threads": torch.get_num_threads(), "torch": torch.__version__}
    assert record == expected and type(record["torch"]) is str


def test_a_compiler_that_does_not_work_is_named_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(model: nn.Module, **_: bool) -> nn.Module:
        raise RuntimeError("no compiler\nfound")

    monkeypatch.setattr(torch, "compile", fail)
    with pytest.raises(RecipeError, match=r"torch.compile does not work here \(no compiler found\); .* eager"):
        measure_latency({"base": nn.Conv2d(3, 4, 1)}, (3, 2, 2), backend="compile")


@pytest.mark.slow
def test_a_compiled_model_is_timed(tmp_path: Path) -> None:
    base = make_base("vit", tmp_path)
    times = measure_latency({"base": base}, (3, 16, 16), backend="compile", repeats=2, warmup=0)
    assert times["base"] > 0
    assert type(base).__name__ == "IsoPruneForImageClassification"  # not the compiled wrapper


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_model_on_the_gpu_is_timed_there() -> None:
    model = nn.Conv2d(3, 8, 3).cuda()
    assert measure_latency({"gpu": model}, (3, 32, 32), repeats=3)["gpu"] > 0


@pytest.mark.parametrize(("name", "low"), [("batch_size", 1), ("repeats", 1), ("warmup", 0)])
def test_a_number_that_is_too_small_is_refused(name: str, low: int) -> None:
    with pytest.raises(RecipeError, match=f"{name} must be at least {low}, got {low - 1}"):
        measure_latency({"base": nn.Linear(1, 1)}, (1, 1, 1), **{name: low - 1})
