"""OpenVINO on the CPU, in fp32 or bf16."""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from importlib import import_module
from typing import Any

import torch

from isoprune_hf.checkpoint.dense import describe_error
from isoprune_hf.checkpoint.modeling_isoprune import IsoPruneForImageClassification
from isoprune_hf.measuring.runtimes.engine import OpenModel, Runtime, RuntimeFailedError
from isoprune_hf.measuring.runtimes.onnx_runtime import Run, numpy_pass
from isoprune_hf.measuring.runtimes.signal_stack import kept_signal_stack
from isoprune_hf.measuring.tracing import EXPORT_ERRORS, output_names, plain_copy, side_by_side, trace_model
from isoprune_hf.recipes.values import DType


class OpenVinoEngine:
    """Runs a converted copy of a module in OpenVINO."""

    label = "OpenVINO"
    packages = ("openvino",)
    min_warmup = 1

    def limitation(self, dtype: DType | None, device: torch.device) -> str | None:
        """Return why models on `device` cannot be timed in `dtype`, or None if they can."""
        if device.type != "cpu":
            return "measured on the CPU only"
        if dtype == "bf16" and "BF16" not in _core().get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
            return "this processor has no instructions for bf16"
        return None

    def session(self) -> AbstractContextManager[None]:
        """Return an empty context."""
        return nullcontext()

    def open(self, model: IsoPruneForImageClassification, images: torch.Tensor, runtime: Runtime) -> OpenModel:
        """Convert a copy and compile it."""
        try:
            program = trace_model(plain_copy(model), images.float().cpu())
            converted = convert_openvino(program, output_names(model))
            threads = runtime.threads or torch.get_num_threads()
            run = open_openvino(converted, dtype=runtime.dtype or "fp32", threads=threads)
        except EXPORT_ERRORS as error:
            raise RuntimeFailedError(
                f"the model cannot be converted to openvino ({describe_error(error)})", "measure in the runtime eager"
            ) from error
        return OpenModel(lambda pixels: numpy_pass(run, pixels))


def convert_openvino(program: torch.export.ExportedProgram, outputs: Sequence[str] = ("logits",)) -> Any:
    """Convert a traced model, from images of any batch size to outputs with these names."""
    converted = import_module("openvino").convert_model(program)
    (images, *_), _ = program.example_inputs
    _, *size = images.shape
    converted.reshape([-1, *size])
    for number, name in enumerate(outputs):
        converted.output(number).get_tensor().set_names({name})
    return converted


def open_openvino(model: Any, *, dtype: DType = "fp32", threads: int = 0) -> Run:
    """Compile a converted model, or the file of one, for the CPU.

    Args:
        model: Result of `convert_openvino`, or a path.
        dtype: Dtype of the computation; without it a CPU that supports bf16 computes in bf16.
        threads: Threads of one inference; 0 uses all cores.
    """
    hint = {"fp32": "f32", "bf16": "bf16"}[dtype]
    settings: dict[str, Any] = {"INFERENCE_PRECISION_HINT": hint, "PERFORMANCE_HINT": "LATENCY"}
    if threads:
        settings["INFERENCE_NUM_THREADS"] = threads
    with kept_signal_stack():
        compiled = _core().compile_model(model, "CPU", settings)
    return lambda pixels: side_by_side([*compiled(pixels).values()])


def _core() -> Any:
    return import_module("openvino").Core()
