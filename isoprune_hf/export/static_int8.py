"""Quantise an ONNX file to eight bits with ranges of real images: `quantize_static`."""

import tempfile
from collections import defaultdict
from collections.abc import Iterator, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np

from isoprune_hf.export.bias_correction import correct_biases, measure_shifts
from isoprune_hf.export.bounded_int8 import hold_out, quantize_bounded
from isoprune_hf.export.sensitivity import DIVERGENCE, Harm, Nodes
from isoprune_hf.export.values import Quantized
from isoprune_hf.measuring.runtimes.onnx_runtime import Run, open_onnx

_WEIGHTED = ("Conv", "ConvTranspose", "Gemm", "MatMul")
# Layers between them that run in eight bits too, so that activations are not converted to fp32 and back. LayerNorm is
# not among them: ONNX Runtime computes it in fp32.
_BETWEEN = (
    *("Add", "AveragePool", "Clip", "Concat", "Flatten", "GlobalAveragePool", "HardSigmoid", "LeakyRelu", "MaxPool"),
    *("Mul", "Pad", "Relu", "Reshape", "Sigmoid", "Slice", "Softmax", "Split", "Squeeze", "Transpose", "Unsqueeze"),
)


def quantize_static(file: Path, batches: Sequence[np.ndarray], harm: Harm = DIVERGENCE) -> Quantized:
    """Replace an ONNX file by one with weights and activations of eight bits, and open it.

    Weights have a scale for each output channel, and biases make up for the mean error of their rounding. Activations
    have the range that they take on the images. Layers whose quantisation changes the outputs most stay in fp32, see
    `quantize_bounded`.

    Args:
        file: The model in fp32.
        batches: Pixels (B, C, H, W) of the calibration images.
        harm: What is bounded.

    Raises:
        ExportError: The bound leaves less than half of the weights in eight bits.
    """
    tools = import_module("onnxruntime.quantization")
    ranges, judged = hold_out(batches)
    with tempfile.TemporaryDirectory(dir=file.parent, prefix=".quantize.") as name:
        prepared, corrected, candidate = (
            Path(name, f"{part}.onnx") for part in ("prepared", "corrected", "candidate")
        )
        # Folds BatchNorm and infers shapes.
        tools.quant_pre_process(file, prepared, skip_symbolic_shape=True)
        _write(prepared, candidate, ranges, frozenset())
        shifts = measure_shifts(prepared, candidate, ranges)

        def write(left_out: Nodes) -> Run:
            correct_biases(prepared, corrected, shifts, left_out)
            _write(corrected, candidate, ranges, left_out)
            return open_onnx(candidate)

        weights, between = _list_nodes(prepared)
        record = quantize_bounded(write, open_onnx(prepared), judged, weights=weights, between=between, harm=harm)
        candidate.replace(file)
    return Quantized(open_onnx(file), {"calibration_images": sum(map(len, ranges)), **record})


def _write(prepared: Path, file: Path, batches: Sequence[np.ndarray], left_out: Nodes) -> None:
    """Write a quantised file; the ranges are measured by the first call and kept beside it."""
    tools = import_module("onnxruntime.quantization")
    tools.quantize_static(
        prepared,
        file,
        _reader(tools, batches),
        quant_format=tools.QuantFormat.QDQ,
        op_types_to_quantize=[*_WEIGHTED, *_BETWEEN],
        per_channel=True,
        # The fastest pair on CPUs with eight-bit dot products.
        activation_type=tools.QuantType.QUInt8,
        weight_type=tools.QuantType.QInt8,
        nodes_to_exclude=sorted(left_out),
        calibration_cache_path=file.with_name("ranges.json"),
    )


def _reader(tools: Any, batches: Sequence[np.ndarray]) -> Any:
    """Return a reader of calibration images as ONNX Runtime wants it."""

    class Reader(tools.CalibrationDataReader):  # type: ignore[misc]  # the package is imported when it is needed
        def __init__(self, pixels: Iterator[np.ndarray]):
            self._pixels = pixels

        def get_next(self) -> dict[str, np.ndarray] | None:
            batch = next(self._pixels, None)
            return None if batch is None else {"pixel_values": batch}

    return Reader(iter(batches))


def _list_nodes(file: Path) -> tuple[dict[str, int], dict[str, list[str]]]:
    """Return the number of weights of each layer that has some, and the names of the nodes between them by type."""
    graph = import_module("onnx").load(file).graph
    sizes = {tensor.name: int(np.prod(tensor.dims)) for tensor in graph.initializer}
    weights = {
        node.name: sum(sizes.get(name, 0) for name in node.input) for node in graph.node if node.op_type in _WEIGHTED
    }
    between: dict[str, list[str]] = defaultdict(list)
    for node in graph.node:
        if node.op_type in _BETWEEN:
            between[node.op_type].append(node.name)
    return weights, between
