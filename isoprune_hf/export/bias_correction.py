"""Correct biases of an ONNX file for the rounding of its weights: `measure_shifts`, then `correct_biases`.

Source:
    Nagel et al., Data-Free Quantization Through Weight Equalization and Bias Correction, ICCV 2019, equation 17; the
    expectation is a mean over images.
"""

from collections.abc import Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np

from isoprune_hf.export.sensitivity import Nodes
from isoprune_hf.measuring.runtimes.onnx_runtime import open_onnx_outputs

_BIASED = ("Conv", "ConvTranspose", "Gemm")  # whose third input is the bias of the channels in dim 1 of the output


def measure_shifts(file: Path, quantized: Path, batches: Sequence[np.ndarray]) -> dict[str, np.ndarray]:
    """Compute by how much the rounding of its weights lowers the mean output of each channel of a layer.

    A copy of each layer, with the rounding errors as weights, reads what the layer reads in fp32: one pass is enough.

    Args:
        file: The model in fp32.
        quantized: The same model with weights in eight bits, its nodes under the same names.
        batches: Pixels (B, C, H, W) of the calibration images.

    Returns:
        Name of a layer -> its shifts (C,), for all quantised layers that may have a bias.
    """
    onnx = import_module("onnx")
    model, probe = onnx.load(file), quantized.with_name("probe.onnx")
    eight_bits = onnx.load(quantized).graph
    layers = _list_layers(eight_bits)
    for node in [node for node in model.graph.node if node.name in layers]:
        _add_copy(model.graph, node, layers[node.name], eight_bits)
    onnx.save(model, probe)
    run = open_onnx_outputs(probe, [_mean_of(name) for name in layers])
    sums: list[Any] = [0.0] * len(layers)
    for pixels in batches:
        sums = [total + len(pixels) * mean.astype(np.float64) for total, mean in zip(sums, run(pixels), strict=True)]
    return {name: total / sum(map(len, batches)) for name, total in zip(layers, sums, strict=True)}


def correct_biases(file: Path, corrected: Path, shifts: Mapping[str, np.ndarray], left_out: Nodes) -> None:
    """Write a model in fp32 whose biases make up for the shifts of all layers but those that are left out."""
    onnx = import_module("onnx")
    model = onnx.load(file)
    values = {tensor.name: tensor for tensor in model.graph.initializer}
    for node in (node for node in model.graph.node if node.name in shifts and node.name not in left_out):
        shift = shifts[node.name]
        if len(node.input) > 2:
            shift = shift + onnx.numpy_helper.to_array(values[node.input[2]])
        name = f"{node.name}.corrected_bias"  # of its own: layers may share a bias
        model.graph.initializer.append(onnx.numpy_helper.from_array(shift.astype(np.float32), name))
        node.input[:] = [*node.input[:2], name]
    onnx.save(model, corrected)


def _list_layers(graph: Any) -> dict[str, Any]:
    """Return the nodes that make the weights of layers of eight bits, by the names of the layers."""
    constants = {tensor.name for tensor in graph.initializer}
    makers = {
        node.output[0]: node
        for node in graph.node
        if node.op_type == "DequantizeLinear" and node.input[0] in constants
    }
    layers = (node for node in graph.node if node.op_type in _BIASED)
    return {node.name: makers[node.input[1]] for node in layers if node.input[1] in makers}


def _add_copy(graph: Any, node: Any, maker: Any, eight_bits: Any) -> None:
    """Add a copy of a layer with the errors of its rounded weights in their place, and the means of its channels.

    Args:
        graph: Graph in fp32, changed in place.
        node: A layer of it.
        maker: Node of another graph that makes the rounded weights.
        eight_bits: That graph.
    """
    onnx = import_module("onnx")
    made = f"{node.name}.shift_of"
    rounded, errors, dims = f"{made}.rounded", f"{made}.errors", f"{made}.dims"
    parts = [tensor for tensor in eight_bits.initializer if tensor.name in maker.input]
    own = {part.name: f"{made}.{part.name}" for part in parts}
    for part in parts:
        tensor = graph.initializer.add()
        tensor.CopyFrom(part)
        tensor.name = own[part.name]
    weights = graph.node.add()
    weights.CopyFrom(maker)
    weights.name, weights.input[:], weights.output[:] = rounded, [own[name] for name in maker.input], [rounded]
    graph.node.append(onnx.helper.make_node("Sub", [node.input[1], rounded], [errors]))
    copy = graph.node.add()
    copy.CopyFrom(node)
    copy.name, copy.input[:], copy.output[:] = made, [node.input[0], errors], [made]
    rank = next(len(part.dims) for part in parts if part.name == maker.input[0])
    others = np.array([dim for dim in range(rank) if dim != 1])
    graph.initializer.append(onnx.numpy_helper.from_array(others, dims))
    graph.node.append(onnx.helper.make_node("ReduceMean", [made, dims], [_mean_of(node.name)], keepdims=0))
    graph.output.append(onnx.helper.make_tensor_value_info(_mean_of(node.name), onnx.TensorProto.FLOAT, None))


def _mean_of(name: str) -> str:
    """Return the name of the mean output of a layer's copy."""
    return f"{name}.shift"
