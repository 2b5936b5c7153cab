"""Quantise an ONNX file to eight bits with ranges of real images: `quantize_static`."""

import tempfile
from collections import defaultdict
from collections.abc import Iterator, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np

from isoprune_hf.errors import ExportError
from isoprune_hf.export.sensitivity import Nodes, Unit, choose_left_out, mean_divergence
from isoprune_hf.export.values import Quantized
from isoprune_hf.measuring.runtimes.onnx_runtime import open_onnx

MAX_DIVERGENCE = 0.02  # nats; EfficientNet-Lite0 loses 0.2 points of top-1 at 0.01
_SEARCH_IMAGES = 64
_MAX_UNITS = 32  # of layers with weights
_MIN_SHARE = 0.5  # of the weights that must be stored in eight bits
_WEIGHTED = ("Conv", "ConvTranspose", "Gemm", "MatMul")
# Layers between them that run in eight bits too, so that activations are not converted to fp32 and back. LayerNorm is
# not among them: ONNX Runtime computes it in fp32.
_BETWEEN = (
    *("Add", "AveragePool", "Clip", "Concat", "Flatten", "GlobalAveragePool", "HardSigmoid", "LeakyRelu", "MaxPool"),
    *("Mul", "Pad", "Relu", "Reshape", "Sigmoid", "Slice", "Softmax", "Split", "Squeeze", "Transpose", "Unsqueeze"),
)


def quantize_static(file: Path, batches: Sequence[np.ndarray]) -> Quantized:
    """Replace an ONNX file by one with weights and activations of eight bits, and open it.

    Weights have a scale for each output channel; activations have the range that they take on the images. Layers whose
    quantisation changes the predictions most stay in fp32, as few as needed for `MAX_DIVERGENCE`.

    Args:
        file: The model in fp32.
        batches: Pixels (B, C, H, W) of the calibration images.

    Raises:
        ExportError: The bound leaves less than half of the weights in eight bits.
    """
    tools = import_module("onnxruntime.quantization")
    sample = _first_images(batches, _SEARCH_IMAGES)
    with tempfile.TemporaryDirectory(dir=file.parent, prefix=".quantize.") as name:
        prepared, candidate = Path(name, "prepared.onnx"), Path(name, "candidate.onnx")
        # Folds BatchNorm and infers shapes.
        tools.quant_pre_process(file, prepared, skip_symbolic_shape=True)
        reference = _run(prepared, sample)

        def effect(left_out: Nodes) -> float:
            _write(prepared, candidate, batches, left_out)
            return mean_divergence(reference, _run(candidate, sample))

        units, sizes = _list_units(prepared)
        choice = choose_left_out(units, effect, MAX_DIVERGENCE)
        share = 1 - sum(sizes.get(node, 0) for node in choice.nodes) / max(sum(sizes.values()), 1)
        if share < _MIN_SHARE:
            raise ExportError(
                f"--precision int8 would store {share:.0%} of the weights in eight bits: with more, the predictions "
                f"differ from fp32 by more than {MAX_DIVERGENCE} nats; use --precision fp16"
            )
        _write(prepared, candidate, batches, choice.nodes)
        candidate.replace(file)
    record = {
        "calibration_images": sum(map(len, batches)),
        "divergence": choice.divergence,
        "left_out": [unit.name for unit in choice.left_out],
        "share_of_weights": share,
    }
    return Quantized(open_onnx(file), record)


def _write(prepared: Path, file: Path, batches: Sequence[np.ndarray], left_out: Nodes) -> None:
    """Write a quantised file; the ranges are measured by the first call and kept beside the prepared file."""
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
        calibration_cache_path=prepared.with_name("ranges.json"),
    )


def _first_images(batches: Sequence[np.ndarray], count: int) -> list[np.ndarray]:
    """Return the first batches, with `count` images in all."""
    found, left = [], count
    for batch in batches:
        if left > 0:
            found.append(batch[:left])
            left -= len(batch)
    return found


def _run(file: Path, batches: Sequence[np.ndarray]) -> np.ndarray:
    """Return the logits of a file for all batches."""
    run = open_onnx(file)
    return np.concatenate([run(pixels) for pixels in batches])


def _reader(tools: Any, batches: Sequence[np.ndarray]) -> Any:
    """Return a reader of calibration images as ONNX Runtime wants it."""

    class Reader(tools.CalibrationDataReader):  # type: ignore[misc]  # the package is imported when it is needed
        def __init__(self, pixels: Iterator[np.ndarray]):
            self._pixels = pixels

        def get_next(self) -> dict[str, np.ndarray] | None:
            batch = next(self._pixels, None)
            return None if batch is None else {"pixel_values": batch}

    return Reader(iter(batches))


def _list_units(file: Path) -> tuple[list[Unit], dict[str, int]]:
    """Return the units of a graph that may be left out, and the number of weights of each node that has some.

    Layers with weights are units of consecutive ones, at most `_MAX_UNITS`; those between them are one unit by type.
    """
    graph = import_module("onnx").load(file).graph
    weights = {tensor.name: int(np.prod(tensor.dims)) for tensor in graph.initializer}
    layers = [node for node in graph.node if node.op_type in _WEIGHTED]
    sizes = {node.name: sum(weights.get(name, 0) for name in node.input) for node in layers}
    size = -(-len(layers) // _MAX_UNITS)
    parts = [layers[start : start + size] for start in range(0, len(layers), max(size, 1))]
    units = [_unit([node.name for node in part]) for part in parts]
    between: dict[str, list[str]] = defaultdict(list)
    for node in graph.node:
        if node.op_type in _BETWEEN:
            between[node.op_type].append(node.name)
    units += [Unit(f"all {kind}", frozenset(names)) for kind, names in sorted(between.items())]
    return units, sizes


def _unit(names: list[str]) -> Unit:
    return Unit(names[0] if len(names) == 1 else f"{names[0]} to {names[-1]}", frozenset(names))
