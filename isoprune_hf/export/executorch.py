"""Export to ExecuTorch for phones and other small devices, with the kernels of XNNPACK."""

from collections.abc import Mapping, Sequence
from importlib import import_module
from pathlib import Path

import numpy as np
import torch

from isoprune_hf.export.values import LOGITS, ExportPrecision, Quantizer
from isoprune_hf.measuring.runtimes.onnx_runtime import Run
from isoprune_hf.measuring.tracing import side_by_side


class ExecuTorchFormat:
    """A program of ExecuTorch, opened with its Python runtime."""

    file = "model.pte"
    packages = ("executorch",)
    takes_batches = True
    limitation = None
    floats: tuple[ExportPrecision, ...] = ("fp32",)
    quantizers: Mapping[ExportPrecision, Quantizer] = {}
    script = (
        "torch, executorch.runtime",
        'executorch.runtime.Runtime.get().load_program(folder / "model.pte").load_method("forward")'
        ".execute([torch.from_numpy(pixels)])[$number].numpy()",
    )

    def write(
        self,
        program: torch.export.ExportedProgram,
        file: Path,
        labels: Mapping[int, str],
        outputs: Sequence[str] = LOGITS,
    ) -> Run:
        """Write a traced model and open it again; see `ExportFormat.write`. The labels are in config.json alone."""
        xnnpack = import_module("executorch.backends.xnnpack.partition.xnnpack_partitioner")
        lower = import_module("executorch.exir").to_edge_transform_and_lower
        file.write_bytes(lower(program, partitioner=[xnnpack.XnnpackPartitioner()]).to_executorch().buffer)
        opened = import_module("executorch.runtime").Runtime.get().load_program(file)
        method = opened.load_method("forward")

        def run(pixels: np.ndarray) -> np.ndarray:
            found = [value.numpy() for value in method.execute([torch.from_numpy(pixels)])]
            return side_by_side(found).copy()  # the memory is the method's, which writes the next outputs into it

        return run
