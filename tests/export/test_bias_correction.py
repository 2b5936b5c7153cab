"""Biases make up for the mean error of rounded weights."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from isoprune_hf.export.bias_correction import correct_biases, measure_shifts
from isoprune_hf.export.static_int8 import quantize_static
from isoprune_hf.measuring.runtimes.onnx_runtime import open_onnx

# Two layers (1, 2, 1, 1) with a scale of 1: the second weight of the first one is rounded from 0.4 to 0, that of the
# second one from 2.75 to 3.
EXACT = {"first": [127.0, 0.4], "second": [-127.0, 2.75]}
ROUNDED = {"first": [127, 0], "second": [-127, 3]}


def save(file: Path, *, in_eight_bits: bool = False, biases: Sequence[str] = ("bias", "bias")) -> Path:
    """Write a model with both layers side by side on the pixels (B, 2, 2, 2)."""
    nodes, tensors = [], [numpy_helper.from_array(np.array([5.0], np.float32), "bias")]
    for (name, exact), bias in zip(EXACT.items(), biases, strict=True):
        weight = np.array(ROUNDED[name] if in_eight_bits else exact, np.int8 if in_eight_bits else np.float32)
        tensors.append(numpy_helper.from_array(weight.reshape(1, 2, 1, 1), f"{name}.weight"))
        if in_eight_bits:
            tensors.append(numpy_helper.from_array(np.ones(1, np.float32), f"{name}.scale"))
            tensors.append(numpy_helper.from_array(np.zeros(1, np.int8), f"{name}.zero"))
            parts = [f"{name}.weight", f"{name}.scale", f"{name}.zero"]
            nodes.append(helper.make_node("DequantizeLinear", parts, [f"{name}.made"], axis=0))
        inputs = ["pixel_values", f"{name}.made" if in_eight_bits else f"{name}.weight", *filter(None, [bias])]
        nodes.append(helper.make_node("Conv", inputs, [f"{name}.out"], name=name))
    nodes.append(helper.make_node("Concat", ["first.out", "second.out"], ["both"], axis=1))
    nodes.append(helper.make_node("GlobalAveragePool", ["both"], ["pooled"]))
    nodes.append(helper.make_node("Flatten", ["pooled"], ["logits"]))
    pixels = helper.make_tensor_value_info("pixel_values", TensorProto.FLOAT, ["batch", 2, 2, 2])
    logits = helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", 2])
    graph = helper.make_graph(nodes, "layers", [pixels], [logits], tensors)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10), file)
    return file


def draw(count: int, seed: int) -> np.ndarray:
    """Return pixels from 0 to 1, whose second channel has a mean of about 0.5."""
    return np.random.default_rng(seed).random((count, 2, 2, 2), dtype=np.float32)


def test_shift_is_mean_error_of_rounded_weights(tmp_path: Path) -> None:
    file, quantized = save(tmp_path / "fp32.onnx"), save(tmp_path / "int8.onnx", in_eight_bits=True)
    batches = [draw(1, 0), draw(3, 1)]
    mean = np.concatenate(batches)[:, 1].mean()
    shifts = measure_shifts(file, quantized, batches)
    assert shifts["first"] == pytest.approx([0.4 * mean], rel=1e-5)
    assert shifts["second"] == pytest.approx([-0.25 * mean], rel=1e-5)


@pytest.mark.parametrize("biases", [("bias", "bias"), ("", "bias")])
def test_layers_get_corrected_biases_of_their_own(biases: tuple[str, str], tmp_path: Path) -> None:
    file, pixels = save(tmp_path / "fp32.onnx", biases=biases), draw(2, 0)
    expected = open_onnx(file)(pixels)
    shifts = {"first": np.array([0.5]), "second": np.array([-2.0])}
    correct_biases(file, tmp_path / "all.onnx", shifts, frozenset())
    correct_biases(file, tmp_path / "part.onnx", shifts, frozenset({"first"}))
    assert open_onnx(tmp_path / "all.onnx")(pixels) == pytest.approx(expected + np.array([0.5, -2.0]), rel=1e-5)
    assert open_onnx(tmp_path / "part.onnx")(pixels) == pytest.approx(expected + np.array([0.0, -2.0]), rel=1e-5)


def test_quantised_layers_keep_mean_outputs(tmp_path: Path) -> None:
    file = save(tmp_path / "model.onnx")
    calibration, others = [draw(16, seed) for seed in range(16)], draw(512, 99)
    expected = open_onnx(file)(others)
    found = quantize_static(file, calibration)
    assert found.record["left_out"] == []
    error = (found.run(others) - expected).mean(axis=0)
    # Without correction the means are off by 0.4 / 2 and 0.25 / 2; outputs have steps of 127.4 / 255.
    assert abs(error) == pytest.approx([0, 0], abs=0.05)
