"""Export to ONNX, opened with ONNX Runtime; `write_onnx` writes one file without the folder around it."""

import json
from collections.abc import Callable, Mapping
from importlib import import_module
from pathlib import Path
from typing import cast

import torch

from isoprune_hf.checkpoint.dense import describe_error
from isoprune_hf.checkpoint.modeling_isoprune import IsoPruneForImageClassification
from isoprune_hf.checkpoint.structure import image_size_of
from isoprune_hf.errors import ExportError
from isoprune_hf.export.tracing import EXPORT_ERRORS, labels_of, plain_copy, trace_model
from isoprune_hf.measuring.runtimes import Run, open_onnx
from isoprune_hf.measuring.speed import draw_images

_MAX_FILE_BYTES = 2**31 - 2**24  # the limit of protobuf, minus space for the graph


class OnnxFormat:
    """ONNX, as torch's dynamo exporter writes it."""

    file = "model.onnx"
    packages = ("onnx", "onnxscript", "onnxruntime")

    @property
    def quantize(self) -> Callable[[Path], Run]:
        """Function that rewrites a file with weights of eight bits and opens it."""
        return quantize_onnx

    def write(self, program: torch.export.ExportedProgram, file: Path, labels: Mapping[int, str]) -> Run:
        """Write a traced model and open it again; see `ExportFormat.write`."""
        size = sum(tensor.nbytes for tensor in program.state_dict.values())
        exported = torch.onnx.export(
            program, dynamo=True, input_names=["pixel_values"], output_names=["logits"], verbose=False
        )
        written = cast("torch.onnx.ONNXProgram", exported)  # torch types it as optional for dynamo=False
        written.model.metadata_props["id2label"] = json.dumps(labels)
        written.save(file, external_data=size > _MAX_FILE_BYTES)
        return open_onnx(file)


def write_onnx(model: IsoPruneForImageClassification, file: Path, *, threads: int) -> Run:
    """Write a model as ONNX and open it again on the CPU.

    Args:
        model: The model in eval mode; it is not changed.
        file: File to write.
        threads: Threads of one operator.

    Returns:
        Function that maps pixels (B, C, H, W) to logits (B, classes).

    Raises:
        ExportError: The model cannot be exported.
    """
    plain = plain_copy(model)
    try:
        program = trace_model(plain, draw_images(plain, image_size_of(plain), 2))
        OnnxFormat().write(program, file, labels_of(plain))
        return open_onnx(file, threads=threads)
    except EXPORT_ERRORS as error:
        raise ExportError(f"the model cannot be exported to onnx: {describe_error(error)}") from error


def quantize_onnx(file: Path) -> Run:
    """Store the weights of an ONNX file in eight bits, activations being rounded at run time, and open it."""
    tools = import_module("onnxruntime.quantization")
    prepared = file.with_name("prepared.onnx")
    # Infers shapes; without them the quantizer prints a warning.
    tools.quant_pre_process(file, prepared, skip_symbolic_shape=True)
    # The convolutions of the CPU support unsigned weights only.
    tools.quantize_dynamic(prepared, file, weight_type=tools.QuantType.QUInt8)
    prepared.unlink()
    return open_onnx(file)
