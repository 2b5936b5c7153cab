"""Export to LiteRT, the successor of TensorFlow Lite, for phones and other small devices."""

import io
from collections.abc import Mapping, Sequence
from contextlib import redirect_stdout
from importlib import import_module
from pathlib import Path

import numpy as np
import torch
from torch import nn

from isoprune_hf.export.values import LOGITS, ExportPrecision, Quantizer
from isoprune_hf.measuring.runtimes.onnx_runtime import Run
from isoprune_hf.measuring.tracing import side_by_side


class LiteRtFormat:
    """A flatbuffer of LiteRT, opened with its interpreter.

    The converter cannot lower views of an unknown batch size, so that the file takes one image.
    """

    file = "model.tflite"
    packages = ("litert_torch", "ai_edge_litert")
    takes_batches = False
    limitation = None
    floats: tuple[ExportPrecision, ...] = ("fp32",)
    quantizers: Mapping[ExportPrecision, Quantizer] = {}
    script = (
        "ai_edge_litert.interpreter",
        'ai_edge_litert.interpreter.Interpreter(str(folder / "model.tflite")).get_signature_runner()'
        '(pixel_values=pixels)["$name"]',
    )

    def write(
        self,
        program: torch.export.ExportedProgram,
        file: Path,
        labels: Mapping[int, str],
        outputs: Sequence[str] = LOGITS,
    ) -> Run:
        """Write a traced model and open it again; see `ExportFormat.write`. The labels are in config.json alone."""
        (images, *_), _ = program.example_inputs
        convert = import_module("litert_torch").convert
        with redirect_stdout(io.StringIO()):  # the converter's progress
            convert(_Named(program, outputs), sample_kwargs={"pixel_values": images[:1]}).export(str(file))
        interpreter = import_module("ai_edge_litert.interpreter").Interpreter(str(file))
        runner = interpreter.get_signature_runner()

        def run(pixels: np.ndarray) -> np.ndarray:
            found = [runner(pixel_values=image[None]) for image in pixels]
            return side_by_side([np.concatenate([each[name] for each in found]) for name in outputs])

        return run


class _Named(nn.Module):
    """A traced model that names its outputs: the converter names inputs and outputs after those of a module."""

    def __init__(self, program: torch.export.ExportedProgram, outputs: Sequence[str]):
        super().__init__()
        self.names = tuple(outputs)
        self.traced = program.module()
        for module in self.modules():
            module.training = False  # a traced module has no `eval`, and the converter warns of training mode

    def forward(self, pixel_values: torch.Tensor) -> dict[str, torch.Tensor]:
        found = self.traced(pixel_values)
        return dict(zip(self.names, found if isinstance(found, tuple) else (found,), strict=True))
