"""Quantise a model of OpenVINO to eight bits with ranges of real images: `quantize_openvino`."""

import io
import logging
import tempfile
from collections import defaultdict
from collections.abc import Sequence
from contextlib import redirect_stdout
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np

from isoprune_hf.export.bounded_int8 import hold_out, quantize_bounded
from isoprune_hf.export.sensitivity import DIVERGENCE, Harm, Nodes
from isoprune_hf.export.values import Quantized
from isoprune_hf.measuring.runtimes.onnx_runtime import Run
from isoprune_hf.measuring.runtimes.openvino import open_openvino
from isoprune_hf.measuring.runtimes.signal_stack import kept_signal_stack

_WEIGHTED = ("Convolution", "GroupConvolution", "MatMul")
_ATTENTION = ("ScaledDotProductAttention", "Softmax")
# Layers between them that nncf quantises too; a product of two activations is one of them.
_BETWEEN = ("Add", "AvgPool", "Concat", "Gelu", "MatMul", "MaxPool", "Multiply", "ReduceMean", "Swish", *_ATTENTION)


def quantize_openvino(file: Path, batches: Sequence[np.ndarray], harm: Harm = DIVERGENCE) -> Quantized:
    """Replace a model of OpenVINO by one with weights and activations of eight bits, made by nncf, and open it.

    Weights have a scale for each output channel; activations have the range that they take on the images, biases are
    corrected. The first layer and those whose quantisation changes the outputs most stay in fp32, see
    `quantize_bounded`.

    Args:
        file: The model in fp32 (XML); its weights are in the file beside it.
        batches: Pixels (B, C, H, W) of the calibration images.
        harm: What is bounded.

    Raises:
        ExportError: The bound leaves less than half of the weights in eight bits.
    """
    ranges, judged = hold_out(batches)
    with tempfile.TemporaryDirectory(dir=file.parent, prefix=".quantize.") as name:
        candidate = Path(name, file.name)

        def write(left_out: Nodes) -> Run:
            quantized = _quantize(file, ranges, left_out)
            import_module("openvino").save_model(quantized, candidate, compress_to_fp16=False)
            return open_openvino(candidate)

        weights, between = _list_nodes(_read(file))
        record = quantize_bounded(
            write,
            open_openvino(file),
            judged,
            weights=weights,
            between=between,
            harm=harm,
            # nncf would give it seven bits, lest sums overflow on older CPUs, at which Lite0 loses most.
            always_out=list(weights)[:1],
        )
        for suffix in (".xml", ".bin"):
            candidate.with_suffix(suffix).replace(file.with_suffix(suffix))
    return Quantized(open_openvino(file), {"calibration_images": sum(map(len, ranges)), **record})


def _quantize(file: Path, batches: Sequence[np.ndarray], left_out: Nodes) -> Any:
    """Return the model of a file with all nodes but the given ones in eight bits."""
    nncf, ranges = import_module("nncf"), import_module("nncf.quantization.range_estimator")
    nncf.set_log_level(logging.WARNING)
    images = [image[None] for batch in batches for image in batch]
    model = _read(file)
    has_attention = any(node.get_type_name() in _ATTENTION for node in model.get_ordered_ops())
    with kept_signal_stack(), redirect_stdout(io.StringIO()):  # the progress of nncf
        return nncf.quantize(
            model,
            nncf.Dataset(images),
            subset_size=len(images),
            # Symmetric weights and asymmetric activations, the choice of ONNX Runtime here.
            preset=nncf.QuantizationPreset.MIXED,
            target_device=nncf.TargetDevice.CPU,
            model_type=nncf.ModelType.TRANSFORMER if has_attention else None,
            ignored_scope=nncf.IgnoredScope(names=sorted(left_out)),
            # Layer after layer, on outputs of the quantised layers before it. The fast way uses the means of inputs,
            # and leaves out a layer with a bias that would change by twice its value.
            fast_bias_correction=False,
            advanced_parameters=nncf.AdvancedQuantizationParameters(
                # The range over all images, the choice of ONNX Runtime; by default it is a mean of their ranges.
                activations_range_estimator_params=ranges.RangeEstimatorParametersSet.MINMAX,
            ),
        )


def _read(file: Path) -> Any:
    return import_module("openvino").Core().read_model(file)


def _list_nodes(model: Any) -> tuple[dict[str, int], dict[str, list[str]]]:
    """Return the number of weights of each layer that has some, and the names of the nodes between them by type."""
    weights: dict[str, int] = {}
    between: dict[str, list[str]] = defaultdict(list)
    for node in model.get_ordered_ops():
        kind, name = node.get_type_name(), node.get_friendly_name()
        size = _count_weights(node) if kind in _WEIGHTED else 0
        if size:
            weights[name] = size
        elif kind in _BETWEEN:
            between[kind].append(name)
    return weights, between


def _count_weights(node: Any) -> int:
    """Return the number of elements of a node's second input, if that is a constant or the reshape of one."""
    source = node.input_value(1).get_node()
    while source.get_type_name() in ("Convert", "Reshape", "Transpose"):
        source = source.input_value(0).get_node()
    return int(np.prod(source.get_output_shape(0))) if source.get_type_name() == "Constant" else 0
