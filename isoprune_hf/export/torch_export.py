"""Export to the format of `torch.export.save`, which PyTorch opens without the code of the model."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch

from isoprune_hf.export.values import LOGITS, ExportPrecision, Quantizer
from isoprune_hf.measuring.runtimes.onnx_runtime import Run
from isoprune_hf.measuring.tracing import side_by_side


class TorchExportFormat:
    """A program of `torch.export`."""

    file = "model.pt2"
    packages = ()
    takes_batches = True
    limitation = None
    floats: tuple[ExportPrecision, ...] = ("fp32", "fp16", "bf16")
    quantizers: Mapping[ExportPrecision, Quantizer] = {}
    script = (
        "torch",
        'torch.export.load(folder / "model.pt2").module()(torch.from_numpy(pixels))$place.detach().numpy()',
    )

    def write(
        self,
        program: torch.export.ExportedProgram,
        file: Path,
        labels: Mapping[int, str],
        outputs: Sequence[str] = LOGITS,
    ) -> Run:
        """Write a traced model and open it again; see `ExportFormat.write`."""
        program.example_inputs = None  # they would be saved with the program
        torch.export.save(program, file, extra_files={"id2label.json": json.dumps(labels)})
        opened = torch.export.load(file).module()

        def run(pixels: np.ndarray) -> np.ndarray:
            with torch.inference_mode():
                found = opened(torch.from_numpy(pixels))
            return side_by_side([value.numpy() for value in (found if isinstance(found, tuple) else (found,))])

        return run
