"""Base and pruned model in one runtime, ready to be timed against each other.

`TorchRuntime` times PyTorch (eager or compiled), `OnnxRuntime` times ONNX Runtime on models that a given function
exports. Both follow the protocol `Runtime`.
"""

import time
from collections.abc import Callable, Mapping
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Literal, Protocol

import numpy as np
import torch

from isoprune_hf.checkpoint.modeling_isoprune import IsoPruneForImageClassification
from isoprune_hf.checkpoint.structure import image_size_of
from isoprune_hf.measuring.backends import Backend
from isoprune_hf.measuring.memory import peak_memory
from isoprune_hf.measuring.speed import Rounds, draw_images, time_calls, time_models
from isoprune_hf.recipes.values import Precision

DType = Literal["fp32", "bf16"]
Models = Mapping[str, IsoPruneForImageClassification]
Run = Callable[[np.ndarray], np.ndarray]  # pixels (B, C, H, W) -> logits (B, classes), both fp32
_PRECISIONS: Mapping[DType, Precision] = {"fp32": "no", "bf16": "bf16"}


class Runtime(Protocol):
    """Some models in one runtime."""

    def limitation(self, dtype: DType, device: torch.device) -> str | None:
        """Return why models on `device` cannot be timed in `dtype`, or None if they can."""
        ...

    def time_passes(self, batch_size: int, dtype: DType, rounds: Rounds) -> dict[str, list[float]]:
        """Time the models in turns.

        Returns:
            Milliseconds of each pass, by name.

        Raises:
            BackendError: The runtime does not work on this machine.
        """
        ...

    def peak_memory(self, batch_size: int, dtype: DType) -> dict[str, int] | None:
        """Return the bytes that each model needs, or None if this runtime cannot tell."""
        ...


class TorchRuntime:
    """PyTorch.

    Args:
        models: Models by name, on one device; they are not changed.
        backend: `eager` or `compile`.
    """

    def __init__(self, models: Models, backend: Backend):
        self._models = models
        self._backend = backend

    def limitation(self, dtype: DType, device: torch.device) -> str | None:
        """Return None: PyTorch times every dtype on every device."""
        return None

    def time_passes(self, batch_size: int, dtype: DType, rounds: Rounds) -> dict[str, list[float]]:
        """Time the models in turns; see `Runtime.time_passes`."""
        return time_models(
            self._models,
            image_size_of(self._models["base"]),
            batch_size=batch_size,
            precision=_PRECISIONS[dtype],
            backend=self._backend,
            rounds=rounds,
        )

    def peak_memory(self, batch_size: int, dtype: DType) -> dict[str, int] | None:
        """Return the bytes that each model needs in eager mode; a compiled model is not measured."""
        if self._backend != "eager":
            return None
        size = image_size_of(self._models["base"])
        return {
            name: peak_memory(model, size, batch_size=batch_size, precision=_PRECISIONS[dtype])
            for name, model in self._models.items()
        }


class OnnxRuntime:
    """ONNX Runtime on the CPU in fp32.

    Args:
        models: Models by name.
        folder: Folder for the exported models.
        write: Exports a model to a file and opens it with as many threads as PyTorch uses.
    """

    def __init__(self, models: Models, folder: Path, write: Callable[[IsoPruneForImageClassification, Path], Run]):
        self._models = models
        self._folder = folder
        self._write = write
        self._runs: dict[str, Run] = {}

    def limitation(self, dtype: DType, device: torch.device) -> str | None:
        """Return why models on `device` cannot be timed in `dtype`, or None if they can."""
        if device.type != "cpu":
            return "measured on the CPU only"
        return None if dtype == "fp32" else "its CPU kernels are of fp32"

    def time_passes(self, batch_size: int, dtype: DType, rounds: Rounds) -> dict[str, list[float]]:
        """Time the models in turns; the first call exports them."""
        if not self._runs:
            self._runs = {
                name: self._write(model, self._folder / f"{name}.onnx") for name, model in self._models.items()
            }
        base = self._models["base"]
        pixels = draw_images(base, image_size_of(base), batch_size).float().cpu().numpy()
        return time_calls({name: partial(_time_run, run, pixels) for name, run in self._runs.items()}, rounds)

    def peak_memory(self, batch_size: int, dtype: DType) -> dict[str, int] | None:
        """Return None: ONNX Runtime does not report the memory of a pass."""
        return None


def open_onnx(file: Path, *, threads: int = 0) -> Run:
    """Open an ONNX model with ONNX Runtime on the CPU.

    Args:
        file: File of the model, with the input `pixel_values` and the output `logits`.
        threads: Threads of one operator; 0 uses all cores.

    Returns:
        Function that maps pixels (B, C, H, W) to logits (B, classes).
    """
    runtime = import_module("onnxruntime")
    options = runtime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3  # errors
    session = runtime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
    return lambda pixels: session.run(["logits"], {"pixel_values": pixels})[0]


def _time_run(run: Run, pixels: np.ndarray) -> float:
    """Return the seconds of one run."""
    start = time.perf_counter()
    run(pixels)
    return time.perf_counter() - start
