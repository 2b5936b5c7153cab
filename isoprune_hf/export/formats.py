"""The formats that a model can be exported to.

`FORMATS` maps each name in `Format` to an `ExportFormat`, which is implemented in a file of its own.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal, Protocol

import torch

from isoprune_hf.export.coreml import CoreMlFormat
from isoprune_hf.export.executorch import ExecuTorchFormat
from isoprune_hf.export.litert import LiteRtFormat
from isoprune_hf.export.onnx import OnnxFormat
from isoprune_hf.export.openvino import OpenVinoFormat
from isoprune_hf.export.torch_export import TorchExportFormat
from isoprune_hf.export.values import LOGITS, ExportPrecision, Quantizer
from isoprune_hf.measuring.runtimes.onnx_runtime import Run

Format = Literal["onnx", "openvino", "torch-export", "executorch", "litert", "coreml"]


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
    def takes_batches(self) -> bool:
        """Return whether the file takes any number of images at once; otherwise it takes one."""
        ...

    @property
    def limitation(self) -> str | None:
        """Why this machine cannot run the format; None if it can."""
        ...

    @property
    def floats(self) -> tuple[ExportPrecision, ...]:
        """Precisions of a traced model that the runtime computes on a CPU."""
        ...

    @property
    def quantizers(self) -> Mapping[ExportPrecision, Quantizer]:
        """Function and packages for each precision of eight bits that the format has."""
        ...

    @property
    def script(self) -> tuple[str, str]:
        """Python that runs the file: name of the runtime's package, and an expression.

        The expression gives an output as an array, of `folder` (Path) and `pixels` (array). In it, `$name` stands for
        the name of the output, `$number` for its number, and `$place` for `[number]` if there are several.
        """
        ...

    def write(
        self,
        program: torch.export.ExportedProgram,
        file: Path,
        labels: Mapping[int, str],
        outputs: Sequence[str] = LOGITS,
    ) -> Run | None:
        """Write a traced model and open it again.

        Args:
            program: The model, from `pixel_values` (B, C, H, W) to its outputs, all in fp32.
            file: File to write.
            labels: Class -> its name, stored in the file.
            outputs: Names of the outputs: of a classifier `logits`, (B, classes).

        Returns:
            Function that maps pixels to the outputs, computed by the runtime of the format on the CPU; None if this
            machine cannot run it.
        """
        ...


FORMATS: Mapping[Format, ExportFormat] = {
    "onnx": OnnxFormat(),
    "openvino": OpenVinoFormat(),
    "torch-export": TorchExportFormat(),
    "executorch": ExecuTorchFormat(),
    "litert": LiteRtFormat(),
    "coreml": CoreMlFormat(),
}


def precisions_of(target: Format) -> tuple[ExportPrecision, ...]:
    """Return the precisions that a format has."""
    return (*FORMATS[target].floats, *FORMATS[target].quantizers)


def packages_of(target: Format, precision: ExportPrecision) -> tuple[str, ...]:
    """Return the packages that a format needs for a precision, besides torch."""
    quantizers = FORMATS[target].quantizers
    return (*FORMATS[target].packages, *(quantizers[precision].packages if precision in quantizers else ()))
