"""The cases of a benchmark: settings, figures, and cases that cannot be measured."""

import itertools
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import nn

from isoprune_hf.errors import MissingExtraError, RecipeError
from isoprune_hf.measuring import timing
from isoprune_hf.measuring.cases import BenchmarkSettings, CaseNote, measure_cases, record_case
from isoprune_hf.measuring.runtimes import opened
from isoprune_hf.measuring.runtimes.engine import OpenModel, Pass, Runtime, RuntimeFailedError
from isoprune_hf.measuring.timing import Passes, Timing


def test_record_holds_quartiles_and_share_of_promise() -> None:
    passes = {"base": Passes((8, 9, 10, 11, 12), (16,) * 5), "pruned": Passes((1, 3, 4, 5, 70), (2,) * 5)}
    row = record_case("eager", "fp32", 1, Timing(passes, None), promised=2.0)
    assert row["base"] == {"median": 10, "low": 9, "high": 11}
    assert row["pruned"] == {"median": 4, "low": 3, "high": 5}
    assert (row["faster"], row["of_promised"], row["turns"]) == (2.5, 1.25, 5)
    assert row["cpu"] == {"base": 16, "pruned": 2} and "busy" not in row
    assert record_case("eager", "fp32", 1, Timing(passes, "load"), promised=2.0)["busy"] == "load"


class Engine:
    """Fails in bf16 with more than one image."""

    label, packages, min_warmup = "eager", (), 0

    def limitation(self, dtype: str, device: torch.device) -> str | None:
        return None

    @contextmanager
    def session(self) -> Iterator[None]:
        yield

    def open(self, model: nn.Module, images: torch.Tensor, runtime: Runtime) -> OpenModel:
        def bind(pixels: torch.Tensor) -> Pass:
            if runtime.dtype == "bf16" and len(pixels) > 1:
                raise RuntimeFailedError("no compiler", "measure without it")
            return lambda: None

        return OpenModel(bind, "not folded" if runtime.dtype == "bf16" else None)


class Net(nn.Module):
    """A model whose images have four numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.config = type("Config", (), {"image_size": [1, 2, 2]})
        self.device = torch.device("cpu")
        self.weight = nn.Parameter(torch.zeros(1))

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        return pixels


def test_failing_case_ends_its_dtype_with_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    # Each look at the clock is a second later: every pass takes one.
    wall, cpu = itertools.count(), itertools.count()
    clock = timing.Clock(lambda: next(wall), lambda: next(cpu))
    monkeypatch.setattr(timing, "Clock", lambda: clock)
    monkeypatch.setitem(opened.ENGINES, "eager", Engine())
    model = Net()
    settings = BenchmarkSettings(batch_sizes=(1, 2, 3), runtimes=("eager",), repeats=5)
    rows, unmeasured, notes = measure_cases({"base": model, "pruned": model}, settings, promised=4.0)
    # A weight and the images of four numbers, in four or two bytes.
    cases = [(row["dtype"], row["batch_size"], row["memory"]["base"]) for row in rows]
    assert cases == [("fp32", 1, 20), ("fp32", 2, 36), ("fp32", 3, 52), ("bf16", 1, 10)]
    assert {(row["faster"], row["of_promised"]) for row in rows} == {(1.0, 0.25)}
    assert unmeasured == [CaseNote("eager", "bf16", "no compiler")]
    assert [str(note) for note in notes] == [f"eager in bf16: {name}: not folded" for name in ("base", "pruned")]


def test_default_leaves_missing_runtimes_out(monkeypatch: pytest.MonkeyPatch) -> None:
    for package in ("onnxruntime", "openvino"):
        monkeypatch.setitem(sys.modules, package, None)
    for name in ("eager", "channels_last", "compile"):
        monkeypatch.setitem(opened.ENGINES, name, Engine())
    settings = BenchmarkSettings(batch_sizes=(1,), dtypes=("fp32",), repeats=5)
    rows, unmeasured, _ = measure_cases({"base": Net(), "pruned": Net()}, settings, promised=4.0)
    assert [row["runtime"] for row in rows] == ["eager", "channels_last", "compile"]
    assert unmeasured == [
        CaseNote("onnxruntime", None, "onnxruntime not installed"),
        CaseNote("openvino", None, "openvino not installed"),
    ]


@pytest.mark.parametrize(
    ("settings", "name"),
    [
        ({"batch_sizes": []}, "batch_sizes"),
        ({"batch_sizes": [1, 0]}, r"batch_sizes\[1\]"),
        ({"repeats": 4}, "repeats"),
        ({"seconds": 0.0}, "seconds"),
    ],
)
def test_setting_out_of_range_is_refused(settings: dict[str, Any], name: str) -> None:
    with pytest.raises(RecipeError, match=name):
        BenchmarkSettings(**settings)


def test_missing_runtime_is_named_with_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(MissingExtraError, match=r"onnxruntime.*isoprune-hf\[export\]"):
        BenchmarkSettings(runtimes=["onnxruntime"])
    BenchmarkSettings()
