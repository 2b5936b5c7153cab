"""Export to OpenVINO."""

from collections.abc import Mapping
from importlib import import_module
from pathlib import Path

import torch

from isoprune_hf.measuring.runtimes import Run


class OpenVinoFormat:
    """OpenVINO's intermediate representation: the graph as XML and the weights next to it, in fp32."""

    file = "openvino_model.xml"
    packages = ("openvino",)
    quantize = None

    def write(self, program: torch.export.ExportedProgram, file: Path, labels: Mapping[int, str]) -> Run:
        """Write a traced model and open it again; see `ExportFormat.write`."""
        openvino = import_module("openvino")
        converted = openvino.convert_model(program)
        (pixels, *_), _ = program.example_inputs
        _, *size = pixels.shape
        converted.reshape([-1, *size])
        converted.output(0).get_tensor().set_names({"logits"})
        # OpenVINO separates the names by spaces.
        names = " ".join(labels[index].replace(" ", "_") for index in sorted(labels))
        converted.set_rt_info(names, ["model_info", "labels"])
        openvino.save_model(converted, file, compress_to_fp16=False)
        # Without the hint a CPU that supports bf16 computes in bf16.
        compiled = openvino.Core().compile_model(file, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
        return lambda pixels: compiled(pixels)["logits"]
