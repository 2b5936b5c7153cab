"""Layers timed in a runtime: which copies of the models are timed, and by what."""

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.tiny_models import make_base
from torch import nn

from isoprune_hf.measuring.runtimes.engine import Runtime
from isoprune_hf.pruning.cost import runtime_times
from isoprune_hf.pruning.cost.runtime_times import time_in_runtime
from isoprune_hf.recipes.values import RuntimeName


@pytest.mark.parametrize("name", ["eager", "compile", "channels_last", "openvino"])
def test_layers_are_timed_in_the_layout_of_the_runtime(
    name: RuntimeName, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    timed: list[Any] = []
    monkeypatch.setattr(runtime_times, "time_layers", lambda variants, *_, **settings: timed.extend(variants))
    base = make_base("resnet", tmp_path).train()
    before = {key: value.clone() for key, value in base.state_dict().items()}
    time_in_runtime([(base, {"conv1": 5})], (3, 64, 64), batch_size=1, runtime=Runtime(name), repeats=1)
    ((model, layer_macs),) = timed
    folds = name in ("channels_last", "openvino")
    assert layer_macs == {"conv1": 5} and (model is base) != folds
    assert any(isinstance(module, nn.BatchNorm2d) for module in model.modules()) != folds
    assert model.model.conv1.weight.is_contiguous(memory_format=torch.channels_last) == folds
    assert all(torch.equal(value, before[key]) for key, value in base.state_dict().items())


def test_onnx_runtime_times_layers_that_are_there(monkeypatch: pytest.MonkeyPatch) -> None:
    def fake(model: str, size: tuple[int, ...], layers: list[str], **settings: int) -> dict[str, float]:
        assert (size, settings) == ((3, 4, 4), {"batch_size": 2, "threads": 3, "repeats": 4})
        return dict.fromkeys(layers, float(len(model)))

    monkeypatch.setattr(runtime_times, "time_onnx_layers", fake)
    variants = [("b", {"a": 1, "gone": 0}), ("bb", {"a": 1})]
    runtime = Runtime("onnxruntime", threads=3)
    assert time_in_runtime(variants, (3, 4, 4), batch_size=2, runtime=runtime, repeats=4) == [{"a": 1.0}, {"a": 2.0}]
