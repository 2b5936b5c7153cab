"""Layers timed in a runtime: which copies of the models are timed, and by what."""

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.tiny_models import make_base
from torch import nn

from isoprune_hf.measuring.onnx_profile import LayerTimes
from isoprune_hf.measuring.runtimes.engine import Runtime
from isoprune_hf.pruning.cost import runtime_times
from isoprune_hf.pruning.cost.runtime_times import time_in_runtime
from isoprune_hf.recipes.values import RuntimeName


@pytest.mark.parametrize("name", ["eager", "compile", "channels_last", "openvino"])
def test_layers_are_timed_in_layout_of_runtime(
    name: RuntimeName, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    timed: list[Any] = []

    def time_layers(variants: list[Any], *_: Any, **settings: Any) -> list[dict[str, float]]:
        timed.extend(variants)
        return [{"conv1": 2.0}]

    monkeypatch.setattr(runtime_times, "time_layers", time_layers)
    monkeypatch.setattr(runtime_times, "measure_latency", lambda models, *_, **settings: {"0": 3.0})
    base = make_base("resnet", tmp_path).train()
    before = {key: value.clone() for key, value in base.state_dict().items()}
    times = time_in_runtime([(base, {"conv1": 5})], (3, 64, 64), batch_size=1, runtime=Runtime(name), repeats=1)
    assert times == [({"conv1": 2.0}, 3.0)]
    ((model, layer_macs),) = timed
    folds = name in ("channels_last", "openvino")
    assert layer_macs == {"conv1": 5} and (model is base) != folds
    assert any(isinstance(module, nn.BatchNorm2d) for module in model.modules()) != folds
    assert model.model.conv1.weight.is_contiguous(memory_format=torch.channels_last) == folds
    assert all(torch.equal(value, before[key]) for key, value in base.state_dict().items())


def test_onnx_runtime_times_layers_that_are_there(monkeypatch: pytest.MonkeyPatch) -> None:
    def fake(model: str, size: tuple[int, ...], layers: list[str], **settings: int) -> LayerTimes:
        assert (size, settings) == ((3, 4, 4), {"batch_size": 2, "threads": 3, "repeats": 4})
        return LayerTimes(dict.fromkeys(layers, 1.0), float(len(model)))

    monkeypatch.setattr(runtime_times, "time_onnx_layers", fake)
    variants = [("b", {"a": 1, "gone": 0}), ("bb", {"a": 1})]
    runtime = Runtime("onnxruntime", threads=3)
    times = time_in_runtime(variants, (3, 4, 4), batch_size=2, runtime=runtime, repeats=4)
    assert times == [({"a": 1.0}, 1.0), ({"a": 1.0}, 2.0)]
