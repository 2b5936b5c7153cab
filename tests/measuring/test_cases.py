"""The cases of a benchmark: settings, figures, and cases that cannot be measured."""

import sys
from collections.abc import Mapping, Sequence
from typing import Any

import pytest
import torch
from torch import nn

from isoprune_hf.errors import MissingExtraError, RecipeError
from isoprune_hf.measuring.backends import BackendError
from isoprune_hf.measuring.cases import BenchmarkSettings, measure_cases, record_case
from isoprune_hf.measuring.runtimes import DType, OnnxRuntime
from isoprune_hf.measuring.speed import Rounds


def test_record_holds_quartiles_and_share_of_promise() -> None:
    times = {"base": [8, 9, 10, 11, 12], "pruned": [1, 3, 4, 5, 70]}
    row = record_case("eager", "fp32", 1, times, promised=2.0)
    assert row["base"] == {"median": 10, "low": 9, "high": 11}
    assert row["pruned"] == {"median": 4, "low": 3, "high": 5}
    assert (row["faster"], row["of_promised"], row["turns"]) == (2.5, 1.25, 5)


class FakeRuntime:
    """Takes a given time, and fails in bf16 with more than one image."""

    def limitation(self, dtype: DType, device: torch.device) -> str | None:
        return None

    def time_passes(self, batch_size: int, dtype: DType, rounds: Rounds) -> Mapping[str, Sequence[float]]:
        if dtype == "bf16" and batch_size > 1:
            raise BackendError("no compiler", "measure without it")
        return {"base": [2.0 * batch_size] * rounds.repeats, "pruned": [1.0 * batch_size] * rounds.repeats}

    def peak_memory(self, batch_size: int, dtype: DType) -> dict[str, int] | None:
        return {"base": batch_size, "pruned": 1} if dtype == "fp32" else None


def test_failing_case_ends_its_dtype_with_a_reason() -> None:
    model = nn.Identity()
    model.device = torch.device("cpu")
    settings = BenchmarkSettings(batch_sizes=(1, 2, 3), runtimes=("eager",), repeats=5)
    rows, unmeasured = measure_cases({"base": model, "pruned": model}, settings, {"eager": FakeRuntime}, promised=4.0)
    cases = [(row["dtype"], row["batch_size"], row.get("memory")) for row in rows]
    assert cases == [
        ("fp32", 1, {"base": 1, "pruned": 1}),
        ("fp32", 2, {"base": 2, "pruned": 1}),
        ("fp32", 3, {"base": 3, "pruned": 1}),
        ("bf16", 1, None),
    ]
    assert {row["of_promised"] for row in rows} == {0.5}
    assert unmeasured == [("eager", "bf16", "no compiler")]


def test_onnx_runtime_needs_cpu_and_fp32(tmp_path: Any) -> None:
    runtime = OnnxRuntime({}, tmp_path, lambda model, file: None)
    assert runtime.limitation("fp32", torch.device("cpu")) is None
    assert runtime.limitation("bf16", torch.device("cpu")) == "its CPU kernels are of fp32"
    assert runtime.limitation("fp32", torch.device("cuda")) == "measured on the CPU only"


@pytest.mark.parametrize(
    ("settings", "name"),
    [
        ({"batch_sizes": []}, "batch_sizes"),
        ({"batch_sizes": [1, 0]}, r"batch_sizes\[1\]"),
        ({"repeats": 4}, "repeats"),
        ({"seconds": 0.0}, "seconds"),
        ({"runtimes": []}, "runtimes"),
    ],
)
def test_setting_out_of_range_is_refused(settings: dict[str, Any], name: str) -> None:
    with pytest.raises(RecipeError, match=name):
        BenchmarkSettings(**settings)


def test_missing_runtime_is_named_with_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(MissingExtraError, match=r"onnxruntime.*isoprune-hf\[export\]"):
        BenchmarkSettings()
    BenchmarkSettings(runtimes=["eager"])
