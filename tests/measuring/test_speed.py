"""Latency: order and number of the timed passes, and the state the models are left in."""

import time
from pathlib import Path

import pytest
import torch
from helpers.tiny_models import make_base
from torch import nn

from isoprune_hf.errors import RecipeError
from isoprune_hf.measuring import speed
from isoprune_hf.measuring.speed import Rounds, measure_latency, measure_pair, record_measurement, time_calls


class Recorder(nn.Module):
    """Records each call in a shared list."""

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


def test_models_are_timed_in_turns_in_eval_mode() -> None:
    calls: list[tuple] = []
    models = {name: Recorder(name, calls) for name in ("base", "pruned")}
    measure_latency(models, (3, 4, 5), batch_size=2, repeats=2, warmup=1)
    assert [call[0] for call in calls] == ["base", "pruned"] * 3
    assert {call[1:] for call in calls} == {((2, 3, 4, 5), torch.float64, False, True)}


def test_latency_is_the_median_in_milliseconds(monkeypatch: pytest.MonkeyPatch) -> None:
    # Start and end of each pass in seconds: one warm-up of 9 s, then 0.002, 0.5 and 0.004 s; the median is 4 ms.
    clock = iter([0, 9, 10, 10.002, 20, 20.5, 30, 30.004])
    monkeypatch.setattr(time, "perf_counter", lambda: next(clock))
    latency = measure_latency({"base": Recorder("base", [])}, (3, 2, 2), repeats=3, warmup=1)
    assert latency == {"base": pytest.approx(4.0)}


def test_training_modes_are_restored_even_after_an_error() -> None:
    model = Recorder("base", []).train()
    model.drop.eval()
    measure_latency({"base": model}, (3, 2, 2), repeats=1, warmup=0)
    assert (model.training, model.drop.training) == (True, False)
    broken = nn.Sequential(nn.Linear(3, 3), nn.Dropout().eval())
    with pytest.raises(RuntimeError):
        measure_latency({"broken": broken}, (3, 2, 2), repeats=1)
    assert (broken.training, broken[0].training, broken[1].training) == (True, True, False)


def test_cuda_device_is_synchronized(monkeypatch: pytest.MonkeyPatch) -> None:
    devices = []
    monkeypatch.setattr(torch.cuda, "synchronize", devices.append)
    speed._synchronize(torch.device("cpu"))
    speed._synchronize(torch.device("cuda", 1))
    assert devices == [torch.device("cuda", 1)]


def test_bf16_times_a_copy_of_the_model() -> None:
    calls: list[tuple] = []
    model = Recorder("base", calls)
    model.__deepcopy__ = lambda memo: Recorder("copy", calls)
    measure_latency({"base": model}, (3, 2, 2), precision="bf16", repeats=1, warmup=0)
    assert [(call[0], call[2]) for call in calls] == [("copy", torch.bfloat16)]
    assert model.weight.dtype == torch.float64


def test_pair_is_measured_at_image_size_of_base(tmp_path: Path) -> None:
    base, order = make_base("vit", tmp_path), []
    pruned = make_base("vit", tmp_path)
    base.register_forward_hook(lambda module, inputs, output: order.append(("base", tuple(inputs[0].shape))))
    pruned.register_forward_hook(lambda module, inputs, output: order.append(("pruned", tuple(inputs[0].shape))))
    times = measure_pair(base, pruned, batch_size=3, repeats=2)
    assert len(times) == 2 and min(times) > 0
    assert order == [("base", (3, 3, 16, 16)), ("pruned", (3, 3, 16, 16))] * 5


def test_record_holds_device_and_settings() -> None:
    settings = {"batch_size": 4, "precision": "bf16", "backend": "compile", "repeats": 7}
    record = record_measurement(torch.device("cpu"), **settings)
    expected = {**settings, "device": "cpu", "threads": torch.get_num_threads(), "torch": torch.__version__}
    assert record == expected and type(record["torch"]) is str


def test_failing_compiler_is_reported_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(model: nn.Module, **_: bool) -> nn.Module:
        raise RuntimeError("no compiler\nfound")

    monkeypatch.setattr(torch, "compile", fail)
    with pytest.raises(RecipeError, match=r"\(no compiler found\).*latency_backend eager"):
        measure_latency({"base": nn.Conv2d(3, 4, 1)}, (3, 2, 2), backend="compile")


@pytest.mark.families
def test_compiled_model_is_timed() -> None:
    base = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU())
    times = measure_latency({"base": base}, (3, 16, 16), backend="compile", repeats=2, warmup=0)
    assert times["base"] > 0
    assert type(base) is nn.Sequential  # not the compiled wrapper


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_model_on_gpu_is_timed_there() -> None:
    model = nn.Conv2d(3, 8, 3).cuda()
    assert measure_latency({"gpu": model}, (3, 32, 32), repeats=3)["gpu"] > 0


@pytest.mark.parametrize(("name", "low"), [("batch_size", 1), ("repeats", 1), ("warmup", 0)])
def test_count_below_minimum_is_refused(name: str, low: int) -> None:
    with pytest.raises(RecipeError, match=f"{name}.* {low}, got {low - 1}"):
        measure_latency({"base": nn.Linear(1, 1)}, (1, 1, 1), **{name: low - 1})


def test_calls_are_made_in_turns_after_warmup() -> None:
    order: list[str] = []
    spent = iter([9.0, 9.0, 0.001, 0.002, 0.003, 0.004])

    def call(name: str) -> float:
        order.append(name)
        return next(spent)

    times = time_calls({name: lambda name=name: call(name) for name in "ab"}, Rounds(repeats=2, warmup=1))
    assert order == ["a", "b"] * 3
    assert times == {"a": pytest.approx([1.0, 3.0]), "b": pytest.approx([2.0, 4.0])}


@pytest.mark.parametrize(
    ("rounds", "count"), [(Rounds(20, 1, seconds=2.5), 5), (Rounds(20, 1, seconds=7.5), 8), (Rounds(3, 0, 0.5), 3)]
)
def test_time_limit_applies_after_five_rounds(rounds: Rounds, count: int) -> None:
    assert len(time_calls({"a": lambda: 1.0}, rounds)["a"]) == count
