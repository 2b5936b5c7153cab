"""Export to ExecuTorch for phones and other small devices, with the kernels of XNNPACK."""

import io
from collections.abc import Mapping, Sequence
from contextlib import redirect_stderr
from importlib import import_module
from pathlib import Path

import numpy as np
import torch

from isoprune_hf.export.bounded_int8 import hold_out
from isoprune_hf.export.pt2e_int8 import quantize_traced, run_module
from isoprune_hf.export.sensitivity import Harm
from isoprune_hf.export.values import LOGITS, ExportPrecision, Quantized, Quantizer
from isoprune_hf.measuring.runtimes.onnx_runtime import Run
from isoprune_hf.measuring.tracing import side_by_side


class ExecuTorchFormat:
    """A program of ExecuTorch for one image at a time, opened with its Python runtime."""

    file = "model.pte"
    packages = ("executorch",)
    takes_batches = False
    limitation = None
    floats: tuple[ExportPrecision, ...] = ("fp32",)
    script = (
        "torch, executorch.runtime",
        'executorch.runtime.Runtime.get().load_program(folder / "model.pte").load_method("forward")'
        ".execute([torch.from_numpy(pixels)])[$number].numpy()",
    )

    @property
    def quantizers(self) -> Mapping[ExportPrecision, Quantizer]:
        """Function and packages for each precision of eight bits."""
        return {"int8": Quantizer(self._quantize, ("torchao",))}

    def write(
        self,
        program: torch.export.ExportedProgram,
        file: Path,
        labels: Mapping[int, str],
        outputs: Sequence[str] = LOGITS,
    ) -> Run:
        """Write a traced model and open it again; see `ExportFormat.write`. The labels are in config.json alone."""
        (images, *_), _ = program.example_inputs
        # The memory of all layers is laid out for the largest batch, and an unbounded one cannot be laid out.
        single = torch.export.export(program.module(), (images[:1],), strict=False)
        xnnpack = import_module("executorch.backends.xnnpack.partition.xnnpack_partitioner")
        lower = import_module("executorch.exir").to_edge_transform_and_lower
        file.write_bytes(lower(single, partitioner=[xnnpack.XnnpackPartitioner()]).to_executorch().buffer)
        return open_executorch(file)

    def _quantize(
        self, program: torch.export.ExportedProgram, file: Path, batches: Sequence[np.ndarray], harm: Harm
    ) -> Quantized:
        """Replace a file in fp32 by one with eight bits, and measure what they change in the runtime."""
        quantized, record = quantize_traced(program, batches, harm)
        file.unlink()  # a runtime that has opened it maps it into memory
        run, (_, judged) = self.write(quantized, file, {}), hold_out(batches)
        expected, found = (
            np.concatenate([each(pixels) for pixels in judged]) for each in (run_module(program.module()), run)
        )
        return Quantized(run, {**record, harm.key: harm.measure(expected, found)})


def open_executorch(file: Path) -> Run:
    """Open a program for one image; the function runs the images of a batch one by one."""
    program = import_module("executorch.runtime").Runtime.get().load_program(file)
    with redirect_stderr(io.StringIO()):  # where it found no description of an ARM processor
        method = program.load_method("forward")

    def run(pixels: np.ndarray) -> np.ndarray:
        rows = []
        for image in torch.from_numpy(pixels):
            found = [value.numpy() for value in method.execute([image[None]])]
            rows.append(side_by_side(found).copy())  # the method writes its next outputs into the same memory
        return np.concatenate(rows)

    return run
