"""Export to OpenVINO."""

from collections.abc import Mapping, Sequence
from importlib import import_module
from pathlib import Path

import torch

from isoprune_hf.export.openvino_int8 import quantize_openvino
from isoprune_hf.export.values import LOGITS, ExportPrecision, Quantizer, reading_file
from isoprune_hf.measuring.runtimes.onnx_runtime import Run
from isoprune_hf.measuring.runtimes.openvino import convert_openvino, open_openvino


class OpenVinoFormat:
    """OpenVINO's intermediate representation: the graph as XML and the weights next to it."""

    file = "openvino_model.xml"
    packages = ("openvino",)
    takes_batches = True
    limitation = None
    floats: tuple[ExportPrecision, ...] = ("fp32", "fp16")
    quantizers: Mapping[ExportPrecision, Quantizer] = {"int8": reading_file(quantize_openvino, ("nncf",))}
    script = (
        "openvino",  # which computes in bf16 where the processor can, unless it is told otherwise
        'openvino.Core().compile_model(folder / "openvino_model.xml", "CPU", {"INFERENCE_PRECISION_HINT": "f32"})'
        '(pixels)["$name"]',
    )

    def write(
        self,
        program: torch.export.ExportedProgram,
        file: Path,
        labels: Mapping[int, str],
        outputs: Sequence[str] = LOGITS,
    ) -> Run:
        """Write a traced model and open it again; see `ExportFormat.write`."""
        converted = convert_openvino(program, outputs)
        # OpenVINO separates the names by spaces.
        names = " ".join(labels[index].replace(" ", "_") for index in sorted(labels))
        converted.set_rt_info(names, ["model_info", "labels"])
        import_module("openvino").save_model(converted, file, compress_to_fp16=False)
        return open_openvino(file)
