"""The formats that a model can be exported to.

`FORMATS` maps each name in `Format` to an `ExportFormat`, which is implemented in a file of its own.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Literal, Protocol

import torch

from isoprune_hf.export.onnx import OnnxFormat
from isoprune_hf.export.openvino import OpenVinoFormat
from isoprune_hf.export.torch_export import TorchExportFormat
from isoprune_hf.measuring.runtimes.onnx_runtime import Run

Format = Literal["onnx", "openvino", "torch-export"]


class ExportFormat(Protocol):
    """A file format, with the runtime that opens it."""

    @property
    def file(self) -> str:
        """Name of the model's file in its folder."""
        ...

    @property
    def packages(self) -> tuple[str, ...]:
        """Packages that writing and opening need, besides torch."""
        ...

    @property
    def quantize(self) -> Callable[[Path], Run] | None:
        """Function that rewrites a file with weights of eight bits and opens it; None if the format has none."""
        ...

    def write(self, program: torch.export.ExportedProgram, file: Path, labels: Mapping[int, str]) -> Run:
        """Write a traced model and open it again.

        Args:
            program: The model, from `pixel_values` (B, C, H, W) to `logits` (B, classes).
            file: File to write.
            labels: Class -> its name, stored in the file.

        Returns:
            Function that maps pixels to logits, computed by the runtime of the format on the CPU.
        """
        ...


FORMATS: Mapping[Format, ExportFormat] = {
    "onnx": OnnxFormat(),
    "openvino": OpenVinoFormat(),
    "torch-export": TorchExportFormat(),
}
