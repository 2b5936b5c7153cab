"""Export to ONNX, opened with ONNX Runtime."""

import json
from collections.abc import Mapping, Sequence
from importlib import import_module
from pathlib import Path

import numpy as np
import torch

from isoprune_hf.export.sensitivity import Harm
from isoprune_hf.export.static_int8 import quantize_static
from isoprune_hf.export.values import LOGITS, ExportPrecision, Quantized, Quantizer, reading_file
from isoprune_hf.measuring.runtimes.onnx_runtime import Run, convert_onnx, open_onnx, save_onnx


class OnnxFormat:
    """ONNX, as torch's dynamo exporter writes it."""

    file = "model.onnx"
    packages = ("onnx", "onnxscript", "onnxruntime")
    takes_batches = True
    limitation = None
    floats: tuple[ExportPrecision, ...] = ("fp32", "fp16")  # the CPU has no kernels of bf16
    script = (
        "onnxruntime",
        'onnxruntime.InferenceSession(folder / "model.onnx").run(["$name"], {"pixel_values": pixels})[0]',
    )

    @property
    def quantizers(self) -> Mapping[ExportPrecision, Quantizer]:
        """Function for each precision of eight bits."""
        return {"int8": reading_file(quantize_static), "int8-dynamic": reading_file(quantize_dynamic)}

    def write(
        self,
        program: torch.export.ExportedProgram,
        file: Path,
        labels: Mapping[int, str],
        outputs: Sequence[str] = LOGITS,
    ) -> Run:
        """Write a traced model and open it again; see `ExportFormat.write`."""
        converted = convert_onnx(program, outputs)
        converted.model.metadata_props["id2label"] = json.dumps(labels)
        save_onnx(converted, program, file)
        return open_onnx(file)


def quantize_dynamic(file: Path, batches: Sequence[np.ndarray], harm: Harm) -> Quantized:
    """Store the weights of an ONNX file in eight bits, activations being rounded at run time, and open it."""
    tools = import_module("onnxruntime.quantization")
    prepared = file.with_name("prepared.onnx")
    # Infers shapes; without them the quantizer prints a warning.
    tools.quant_pre_process(file, prepared, skip_symbolic_shape=True)
    # The convolutions of the CPU support unsigned weights only.
    tools.quantize_dynamic(prepared, file, weight_type=tools.QuantType.QUInt8)
    prepared.unlink()
    return Quantized(open_onnx(file), {})
