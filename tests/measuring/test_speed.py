"""Latency: order and number of the timed passes, and the state the models are left in."""

import pytest
import torch
from torch import nn

from isoprune_hf.errors import RecipeError
from isoprune_hf.measuring import timing
from isoprune_hf.measuring.runtimes import engine
from isoprune_hf.measuring.runtimes.engine import Runtime
from isoprune_hf.measuring.speed import measure_latency, record_measurement, runtime_of


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
    seconds = iter([0, 9, 10, 10.002, 20, 20.5, 30, 30.004])
    clock = timing.Clock(lambda: next(seconds), lambda: 0.0)
    monkeypatch.setattr(timing, "Clock", lambda: clock)
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
    engine.synchronize(torch.device("cpu"))
    engine.synchronize(torch.device("cuda", 1))
    assert devices == [torch.device("cuda", 1)]


def test_bf16_times_a_copy_of_the_model() -> None:
    calls: list[tuple] = []
    model = Recorder("base", calls)
    model.__deepcopy__ = lambda memo: Recorder("copy", calls)
    measure_latency({"base": model}, (3, 2, 2), runtime=Runtime(dtype="bf16"), repeats=1, warmup=0)
    assert [(call[0], call[2]) for call in calls] == [("copy", torch.bfloat16)]
    assert model.weight.dtype == torch.float64


def test_record_holds_device_and_settings() -> None:
    settings = {"batch_size": 4, "precision": "bf16", "backend": "compile", "repeats": 7}
    record = record_measurement(torch.device("cpu"), runtime_of("compile", "bf16"), batch_size=4, repeats=7)
    expected = {**settings, "device": "cpu", "threads": torch.get_num_threads(), "torch": torch.__version__}
    assert record == expected and type(record["torch"]) is str


def test_failing_compiler_is_reported_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(model: nn.Module, **_: bool) -> nn.Module:
        raise RuntimeError("no compiler\nfound")

    monkeypatch.setattr(torch, "compile", fail)
    with pytest.raises(RecipeError, match=r"\(no compiler found\).*runtime eager"):
        measure_latency({"base": nn.Conv2d(3, 4, 1)}, (3, 2, 2), runtime=Runtime("compile"))


@pytest.mark.families
def test_compiled_model_is_timed() -> None:
    base = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU())
    times = measure_latency({"base": base}, (3, 16, 16), runtime=Runtime("compile"), repeats=2, warmup=0)
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
