"""ONNX Runtime on the CPU in fp32."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from importlib import import_module
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch

from isoprune_hf.checkpoint.dense import describe_error
from isoprune_hf.checkpoint.modeling_isoprune import IsoPruneForImageClassification
from isoprune_hf.measuring.runtimes.engine import OpenModel, Pass, Runtime, RuntimeFailedError
from isoprune_hf.measuring.tracing import EXPORT_ERRORS, output_names, plain_copy, side_by_side, trace_model
from isoprune_hf.recipes.values import DType

if TYPE_CHECKING:
    from torch.onnx import ONNXProgram

# Pixels (B, C, H, W) -> logits (B, classes), or several outputs as `side_by_side` returns them, in fp32.
Run = Callable[[np.ndarray], np.ndarray]
_MAX_FILE_BYTES = 2**31 - 2**24  # the limit of protobuf, minus space for the graph


class OnnxRuntimeEngine:
    """Runs an exported copy of a module in ONNX Runtime."""

    label = "ONNX Runtime"
    packages = ("onnx", "onnxscript", "onnxruntime")
    min_warmup = 1

    def limitation(self, dtype: DType | None, device: torch.device) -> str | None:
        """Return why models on `device` cannot be timed in `dtype`, or None if they can."""
        if device.type != "cpu":
            return "measured on the CPU only"
        return None if dtype in (None, "fp32") else "its CPU kernels are of fp32"

    def session(self) -> AbstractContextManager[None]:
        """Return an empty context."""
        return nullcontext()

    def open(self, model: IsoPruneForImageClassification, images: torch.Tensor, runtime: Runtime) -> OpenModel:
        """Export a copy to a temporary file and open it."""
        try:
            program = trace_model(plain_copy(model), images.float().cpu())
            with TemporaryDirectory() as folder:
                file = Path(folder) / "model.onnx"
                save_onnx(convert_onnx(program, output_names(model)), program, file)
                run = open_onnx(file, threads=runtime.threads or torch.get_num_threads())
        except EXPORT_ERRORS as error:
            raise RuntimeFailedError(
                f"the model cannot be exported to onnx ({describe_error(error)})", "measure in the runtime eager"
            ) from error
        return OpenModel(lambda pixels: numpy_pass(run, pixels))


def convert_onnx(program: torch.export.ExportedProgram, outputs: Sequence[str] = ("logits",)) -> "ONNXProgram":
    """Convert a traced model, from `pixel_values` to outputs with these names."""
    exported = torch.onnx.export(
        program, dynamo=True, input_names=["pixel_values"], output_names=[*outputs], verbose=False
    )
    return cast("ONNXProgram", exported)  # torch types it as optional for dynamo=False


def save_onnx(converted: "ONNXProgram", program: torch.export.ExportedProgram, file: Path) -> None:
    """Write a converted model; large weights go to a file beside it."""
    size = sum(tensor.nbytes for tensor in program.state_dict.values())
    converted.save(file, external_data=size > _MAX_FILE_BYTES)


def open_onnx(file: Path, *, threads: int = 0) -> Run:
    """Open an ONNX model with ONNX Runtime on the CPU.

    Args:
        file: File of the model, with the input `pixel_values`.
        threads: Threads of one operator; 0 uses all cores.

    Returns:
        Function that maps pixels (B, C, H, W) to the outputs.
    """
    session = _open_session(file, threads)
    return lambda pixels: side_by_side(session.run(None, {"pixel_values": pixels}))


def open_onnx_outputs(file: Path, names: Sequence[str]) -> Callable[[np.ndarray], list[np.ndarray]]:
    """Open an ONNX model as `open_onnx` does; the function returns the outputs of these names."""
    session = _open_session(file, 0)
    return lambda pixels: cast("list[np.ndarray]", session.run([*names], {"pixel_values": pixels}))


def _open_session(file: Path, threads: int) -> Any:
    runtime = import_module("onnxruntime")
    options = runtime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3  # errors
    return runtime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])


def numpy_pass(run: Run, images: torch.Tensor) -> Pass:
    """Return the call of a pass of a runtime that reads arrays."""
    pixels = images.float().cpu().numpy()
    return lambda: run(pixels)
