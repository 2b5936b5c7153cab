"""Quantise a traced model to eight bits for XNNPACK with ranges of real images: `quantize_traced`."""

import operator
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from importlib import import_module
from typing import Any

import numpy as np
import torch
from torch.fx import GraphModule, Node

from isoprune_hf.export.bounded_int8 import hold_out, quantize_bounded
from isoprune_hf.export.sensitivity import DIVERGENCE, Harm, Nodes
from isoprune_hf.measuring.runtimes.onnx_runtime import Run
from isoprune_hf.measuring.tracing import side_by_side

_WEIGHTED = ("conv1d", "conv2d", "conv_transpose2d", "linear")
# Layers between them that the quantiser of XNNPACK annotates itself; others, such as a pooling, follow their inputs.
_BETWEEN = ("adaptive_avg_pool2d", "add", "add_", "cat", "mul", "mul_")
_MIN_SCALE = 2**-12  # of the quantiser's own configuration


def quantize_traced(
    program: torch.export.ExportedProgram, batches: Sequence[np.ndarray], harm: Harm = DIVERGENCE
) -> tuple[torch.export.ExportedProgram, dict[str, Any]]:
    """Quantise weights and activations of a traced model to eight bits by torchao's pt2e.

    Weights have a scale for each output channel. Activations have the range that they take on the images. Layers whose
    quantisation changes the outputs most stay in fp32, see `quantize_bounded`; outputs are those of PyTorch, which
    computes with the rounded values.

    Args:
        program: The model in fp32, left untouched.
        batches: Pixels (B, C, H, W) of the calibration images.
        harm: What is bounded.

    Returns:
        The quantised model for one image, and how it was quantised.

    Raises:
        ExportError: The bound leaves less than half of the weights in eight bits.
    """
    ranges, judged = hold_out(batches)
    dense = program.module()
    quantized = dense

    def write(left_out: Nodes) -> Run:
        nonlocal quantized
        quantized = _quantize(program, ranges, left_out)
        return run_module(quantized)

    weights, between = _list_nodes(dense)
    record = quantize_bounded(write, run_module(dense), judged, weights=weights, between=between, harm=harm)
    single = torch.export.export(quantized, (torch.from_numpy(judged[0][:1]),), strict=False)
    return single, {"calibration_images": sum(map(len, ranges)), **record}


def _quantize(program: torch.export.ExportedProgram, batches: Sequence[np.ndarray], left_out: Nodes) -> GraphModule:
    """Return a traced model with all nodes but the given ones in eight bits."""
    tools = import_module("torchao.quantization.pt2e.quantize_pt2e")
    xnnpack = import_module("executorch.backends.xnnpack.quantizer.xnnpack_quantizer")
    config = xnnpack.get_symmetric_quantization_config(is_per_channel=True)
    # The range over all images, the choice of ONNX Runtime; by default it is one that a histogram suggests.
    observer = import_module("torchao.quantization.pt2e").MinMaxObserver.with_args(eps=_MIN_SCALE)
    inputs, outputs = (
        replace(spec, observer_or_fake_quant_ctr=observer)
        for spec in (config.input_activation, config.output_activation)
    )
    quantizer = xnnpack.XNNPACKQuantizer()
    quantizer.set_global(replace(config, input_activation=inputs, output_activation=outputs))
    # Without those of training, which compile networks of their own, and find no BatchNorm: it has been folded.
    quantizer.SUPPORTED_PATTERNS = [pattern for pattern in quantizer.SUPPORTED_PATTERNS if not pattern.is_qat]
    quantizer.set_filter_function(lambda node: node.name not in left_out)
    prepared = tools.prepare_pt2e(program.module(), quantizer)
    with torch.no_grad():
        for pixels in batches:
            prepared(torch.from_numpy(pixels))
    converted: GraphModule = tools.convert_pt2e(prepared)
    return converted


def run_module(module: torch.nn.Module) -> Run:
    """Return a function that maps pixels to the outputs of a traced model."""

    def run(pixels: np.ndarray) -> np.ndarray:
        with torch.no_grad():
            found = module(torch.from_numpy(pixels))
        return side_by_side([value.numpy() for value in (found if isinstance(found, tuple) else (found,))])

    return run


def _list_nodes(module: GraphModule) -> tuple[dict[str, int], dict[str, list[str]]]:
    """Return the number of weights of each layer that has some, and the names of the nodes between them by type."""
    weights: dict[str, int] = {}
    between: dict[str, list[str]] = defaultdict(list)
    for node in module.graph.nodes:
        kind = _kind_of(node)
        if kind in _WEIGHTED:
            size = _count_weights(module, node)
            if size:
                weights[node.name] = size
        elif kind in _BETWEEN:
            between[kind.rstrip("_")].append(node.name)
    return weights, between


def _kind_of(node: Node) -> str:
    """Return the name of the operation of a node without its overload, empty if it calls none."""
    packet = getattr(node.target, "overloadpacket", None)
    return "" if packet is None else str(packet.__name__)


def _count_weights(module: GraphModule, node: Node) -> int:
    """Return the number of elements of a node's second input, if that is a parameter."""
    source = node.args[1]
    if not isinstance(source, Node) or source.op != "get_attr":
        return 0
    return int(operator.attrgetter(str(source.target))(module).numel())
